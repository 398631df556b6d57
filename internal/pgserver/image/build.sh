#!/bin/bash
# build.sh IMAGE...   IMAGE: outbox-postgres:15, outbox-postgres:17, outbox-postgres:18 or outbox-pgbouncer:1.24
#
# Makes the images that the tests run on out of Debian's packages, for machines
# where Docker works but no registry can be reached. Packages come from the mirror
# that this machine's apt is set up with. An image that is up to date is left alone.
# Needs apt-get, dpkg-deb, docker and rights to talk to its daemon; root only where
# apt has no package lists yet.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

die() { echo "build.sh: $*" >&2; exit 1; }

for tool in apt-get dpkg-deb docker flock; do
  command -v "$tool" >/dev/null || die "no $tool on this machine"
done
[ -r "$keyring" ] || die "no $keyring: package debian-archive-keyring is missing"

# The stamp names the version of this recipe; pgserver computes the same.
stamp=$(cat "$here/build.sh" "$here/entrypoint.sh" | sha256sum | cut -c1-16)

up_to_date() {
  [ "$(docker image inspect -f '{{index .Config.Labels "outbox.stamp"}}' "$1" 2>/dev/null)" = "$stamp" ]
}

# Test packages start in parallel, and each may find that the image is missing:
# one builds, the others wait here and find it done. The lock is taken on the
# keyring because every user can open it and nothing has to be cleaned up after.
exec 9<"$keyring"
flock -w 600 9 || die "another build did not end in 10 minutes"

todo=()
for image in "$@"; do up_to_date "$image" || todo+=("$image"); done
[ ${#todo[@]} -gt 0 ] || exit 0

# repo LABEL prints the base URL of that archive, as apt knows it.
repo() {
  apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' |
    awk -v label="$1" '$1 == label { print $2; exit }'
}
mirror=$(repo Debian)
if [ -z "$mirror" ] && [ "$(id -u)" = 0 ]; then
  # Other sources of this machine may fail; only Debian's lists matter.
  apt-get -qq update >/dev/null || true
  mirror=$(repo Debian)
fi
[ -n "$mirror" ] || die "apt knows no Debian mirror: run apt-get update"
security=$(repo Debian-Security)

# Packages that the dependencies name and a test server never loads: the JIT's
# LLVM, Perl, and what only maintainer scripts use. check_libraries guards the list.
unused='^(libllvm|libz3-|perl|libperl|libgdbm|libdb5|locales|libc-l10n|libc-gconv|systemd|libsystemd-shared|gcc-|ucf$|adduser|debconf|dpkg$|tar$|procps|libproc2|ssl-cert|openssl$|postgresql-common|postgresql-client-common|sensible-utils|libpam-modules|passwd|logsave|init-system|lib.*-perl$)'

# check_libraries IMAGE: every binary finds its shared libraries, inside the image.
check_libraries() {
  local missing
  missing=$(docker run --rm --network none --entrypoint bash "$1" -c '
    shopt -s nullglob
    for f in /usr/lib/postgresql/*/bin/* /usr/lib/postgresql/*/lib/*.so /usr/sbin/pgbouncer /usr/bin/setpriv; do
      ldd "$f" 2>/dev/null
    done' | grep 'not found' | sort -u || true)
  [ -z "$missing" ] || die "$1 lacks libraries: $missing"
}

build() ( # build IMAGE
  set -euo pipefail
  image=$1 version=${1#*:}
  case $image in
    outbox-postgres:15) suite=bookworm package=postgresql-15 ;;
    outbox-postgres:17) suite=trixie package=postgresql-17 ;;
    outbox-postgres:18) suite=forky package=postgresql-18 ;;
    outbox-pgbouncer:1.24) suite=trixie package=pgbouncer ;;
    *) die "cannot build $image: Debian has PostgreSQL 15, 17 and 18 and PgBouncer 1.24" ;;
  esac

  tmp=/dev/shm
  [ -w $tmp ] || tmp=${TMPDIR:-/tmp}
  work=$(mktemp -d "$tmp/outbox-image.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  trap 'exit 1' TERM INT HUP
  mkdir -p "$work"/{lists/partial,archives/partial,etc/apt.conf.d,etc/preferences.d,debs,root}

  # An apt of its own, with nothing installed: the machine's is neither read nor
  # changed. A mirror that lags a few weeks is good enough; signatures are checked.
  : >"$work/status"
  echo "deb [signed-by=$keyring] $mirror $suite main" >"$work/etc/sources.list"
  [ -z "$security" ] ||
    echo "deb [signed-by=$keyring] $security $suite-security main" >>"$work/etc/sources.list"
  cat >"$work/apt.conf" <<END
Dir::Etc "$work/etc"; Dir::State "$work"; Dir::State::status "$work/status";
Dir::Cache "$work"; Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache "";
Acquire::Languages "none"; Acquire::Check-Valid-Until "false"; Acquire::Retries "3"; APT::Sandbox::User "root";
APT::Install-Recommends "false"; Debug::NoLocking "true";
END
  export APT_CONFIG=$work/apt.conf
  apt-get -qq update
  names=$(apt-get -qq --simulate install "$package" bash coreutils dash grep sed mawk util-linux libc-bin tzdata |
    awk '$1 == "Inst" { print $2 }' | grep -vE "$unused")
  (cd "$work/debs" && apt-get -qq download $names >/dev/null)

  cd "$work/root"
  # Debian's merged /usr; the packages expect the links to be there.
  mkdir -p usr/{bin,sbin,lib,lib64} etc tmp root proc sys dev run var/lib/postgresql docker-entrypoint-initdb.d
  for d in bin sbin lib lib64; do ln -s usr/$d $d; done
  ln -s /run var/run
  chmod 1777 tmp
  for deb in "$work"/debs/*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink --no-same-owner \
      --exclude='./usr/share/'{doc,man,locale,bash-completion}'/*' --exclude='./usr/share/postgresql/*/man/*' \
      --exclude='*/bitcode/*' --exclude='*llvmjit*'
  done
  cat >etc/passwd <<END
root:x:0:0:root:/root:/bin/bash
postgres:x:999:999::/var/lib/postgresql:/bin/bash
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
END
  printf 'root:x:0:\npostgres:x:999:\nnogroup:x:65534:\n' >etc/group
  ln -sf /usr/share/zoneinfo/UTC etc/localtime
  # Links that the packages' own install scripts would have made.
  [ -e usr/bin/awk ] || ln -s mawk usr/bin/awk
  [ -e usr/bin/sh ] || ln -s dash usr/bin/sh
  install -D -m 755 "$here/entrypoint.sh" usr/local/bin/docker-entrypoint.sh
  /sbin/ldconfig -r . 2>/dev/null

  path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin
  changes=(-c "LABEL outbox.stamp=$stamp")
  case $image in
    outbox-postgres:*)
      changes+=(-c "ENV PATH=/usr/lib/postgresql/$version/bin:$path LANG=C.UTF-8 PGDATA=/var/lib/postgresql/data PG_MAJOR=$version"
        -c 'EXPOSE 5432' -c 'ENTRYPOINT ["docker-entrypoint.sh"]' -c 'CMD ["postgres"]') ;;
    *)
      changes+=(-c "ENV PATH=$path" -c 'USER nobody' -c 'EXPOSE 6432') ;;
  esac
  old=$(docker image inspect -f '{{.Id}}' "$image" 2>/dev/null || true)
  new=$(tar -c --owner=0 --group=0 --numeric-owner . | docker import "${changes[@]}" -)
  check_libraries "$new"
  docker tag "$new" "$image"
  [ -z "$old" ] || docker image rm "$old" >/dev/null 2>&1 || true
  echo "$image built from Debian $suite: $(ls "$work/debs" | grep -oE "^${package}_[^_]+")"
)

pids=()
for image in "${todo[@]}"; do build "$image" & pids+=($!); done
trap 'kill "${pids[@]}" 2>/dev/null; wait; exit 1' TERM INT HUP
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
exit $status
