package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/seed3357934d/outbox"
)

const (
	firstPause  = 5 * time.Millisecond // between two claims, after one that found something
	maxSettle   = 1000                 // rows in one statement
	gatherTime  = time.Millisecond     // for results to come together, while more is being sent
	claimGrace  = time.Second          // for a claim to end by itself when ctx has ended
	heedTime    = time.Second          // for a Send to heed the end of its ctx
	closingTime = 5 * time.Second      // for noting the last results
)

// item is a row that this relay has claimed and not yet settled.
type item struct {
	*outbox.Claimed
	claimed time.Time // just before the claim
	until   time.Time // the lease does not end before this

	notBefore  time.Time          // when to try again to send or to settle what is held
	tries      int                // how often it was held, or failed to be settled
	cancel     context.CancelFunc // of its Send, while there is one
	settlement outbox.Settlement
	maybeDone  bool // a settle failed that may have taken effect
}

// run is one call of Run or RunOnce.
//
// One goroutine claims, Concurrency of them send, one settles and one renews leases.
// While a batch is being sent the next is being claimed and the last one settled.
type run struct {
	*Relay

	// Each holds one signal: there is something to send, to settle, room to claim for,
	// or less under way.
	toSend, toSettle, room, progress chan struct{}

	mu        sync.Mutex
	live      map[*item]struct{} // all that is waiting, taken or finished
	waiting   []*item            // to be sent, in this order
	taken     int                // from waiting, and not yet finished or put back
	finished  []*item            // to be settled, in this order
	unsettled int                // finished, and what is being settled just now
	workers   int
	suspect   *item   // the live one that suspected is true of
	apart     []int64 // rows handed back so as not to share its fate
	closed    bool    // nothing more will be claimed
	ended     bool    // nothing more will be sent
	failing   bool    // the last settle failed
	settled   int     // rows, since the start
}

func newRun(r *Relay) *run {
	signal := func() chan struct{} { return make(chan struct{}, 1) }
	return &run{
		Relay: r, live: make(map[*item]struct{}),
		toSend: signal(), toSettle: signal(), room: signal(), progress: signal(),
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// do delivers what claim claims, until that returns and all is settled, or until
// ctx ends and what is under way has been brought to an end.
func (r *run) do(ctx context.Context, claim func(context.Context) error) error {
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	sendCtx, cancelSends := afterwards(ctx, r.cfg.ShutdownTimeout)
	defer cancelSends()

	var others sync.WaitGroup
	others.Go(func() { r.settle(background) })
	others.Go(func() { r.renew(background) })
	r.workers = r.cfg.Concurrency
	for range r.cfg.Concurrency {
		go r.work(ctx, sendCtx)
	}

	err := claim(ctx)
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	signal(r.toSend)
	r.await(ctx, func() bool { return len(r.waiting) == 0 && r.taken == 0 })
	r.handBack()

	heed, cancel := afterwards(ctx, r.cfg.ShutdownTimeout+heedTime)
	defer cancel()
	r.await(heed, func() bool { return r.taken == 0 })
	closing, cancel := afterwards(ctx, closingTime)
	defer cancel()
	closing, cancel = context.WithTimeout(closing, r.cfg.Lease)
	defer cancel()
	r.await(closing, func() bool { return r.unsettled == 0 })
	stop()
	others.Wait()
	r.await(closing, func() bool { return r.workers == r.taken })

	r.mu.Lock()
	defer r.mu.Unlock()
	if r.taken > 0 {
		err = errors.Join(err, fmt.Errorf("relay: %d deliveries did not end, their outcome is unknown", r.taken))
	}
	if r.unsettled > 0 {
		err = errors.Join(err, fmt.Errorf("relay: the results of %d deliveries could not be noted", r.unsettled))
	}
	return err
}

// afterwards returns a context that ends d after ctx has ended.
func afterwards(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	out, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		_ = sleep(out, d)
		cancel()
	})
	return out, func() {
		stop()
		cancel()
	}
}

// sleep pauses for d, or returns ctx's error if that ends first.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// await waits until reached, asked under the lock, is true, or ctx ends.
func (r *run) await(ctx context.Context, reached func() bool) {
	for {
		r.mu.Lock()
		yes := reached()
		r.mu.Unlock()
		if yes {
			return
		}
		select {
		case <-r.progress:
		case <-ctx.Done():
			return
		}
	}
}

// claimOn claims until ctx ends.
func (r *run) claimOn(ctx context.Context) error {
	var (
		trouble = outage{log: r.log, doing: "claim"}
		token   = outbox.NewToken()
		pause   = firstPause
		ever    bool
	)
	for ctx.Err() == nil {
		limit := r.capacity()
		if limit == 0 {
			select {
			case <-r.room:
			case <-ctx.Done():
			}
			continue
		}
		found, err := r.claim(ctx, token, limit)
		switch {
		case err != nil && ctx.Err() != nil:
			continue // which ends the loop
		case errors.Is(err, outbox.ErrInvalid), errors.Is(err, outbox.ErrSetup) && !ever:
			return err
		case err != nil:
			// Its rows may have been claimed all the same: the next claim has the same token.
			trouble.began(err)
			_ = sleep(ctx, trouble.pause())
			if errors.Is(err, context.DeadlineExceeded) {
				r.awaitAnswer(ctx, &trouble)
			}
			continue
		}
		trouble.ended()
		ever = true
		token = outbox.NewToken()
		switch {
		case found >= limit:
			pause = 0
		case found > 0:
			pause = min(firstPause, r.cfg.PollInterval)
		default:
			pause = min(max(pause+pause/2, firstPause), r.cfg.PollInterval)
		}
		if pause == 0 {
			continue
		}
		timer := time.NewTimer(pause - rand.N(pause/5+1)) // so that relays do not march in step
		select {
		case <-r.wake:
			pause = 0
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
	return nil
}

// awaitAnswer asks the database until it answers. A claim that had no answer in time may
// be with a frozen server still. More of them would be carried out side by side when that
// goes on, and of the rows that they lease the repeat would return one claim's worth: the
// others would be leased to nobody.
func (r *run) awaitAnswer(ctx context.Context, trouble *outage) {
	for ctx.Err() == nil {
		call, cancel := context.WithTimeout(ctx, r.callTimeout())
		_, err := r.queue.Extend(call, []outbox.Lease{{}}, r.cfg.Lease) // of no row
		cancel()
		if err == nil {
			_ = sleep(ctx, 100*time.Millisecond) // for the claim to end
			return
		}
		trouble.began(err)
		_ = sleep(ctx, trouble.pause())
	}
}

// capacity is how many rows to claim now: 0 until half of what may wait has been
// taken to be sent, so that claims are of a fair size.
func (r *run) capacity() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	batch := r.cfg.BatchSize
	free := batch - len(r.waiting)
	// What cannot be settled yet is not to pile up behind callers that hold its rows.
	if r.failing || free < (batch+1)/2 || len(r.live) >= 4*batch+r.cfg.Concurrency {
		return 0
	}
	return free
}

// claim claims up to limit rows and returns how many it found, those that it failed
// included.
func (r *run) claim(ctx context.Context, token outbox.Token, limit int) (int, error) {
	// When ctx ends, the answer should still be heard: nobody else knows these rows are free.
	grace, cancel := afterwards(ctx, claimGrace)
	defer cancel()
	grace, cancel = context.WithTimeout(grace, r.callTimeout())
	defer cancel()
	began := time.Now()
	res, err := r.queue.Claim(grace, outbox.ClaimOptions{
		Limit: limit, Lease: r.cfg.Lease, Token: token, Types: r.cfg.Types, MaxAttempts: max(r.cfg.MaxAttempts, 0),
		AtMostOnce: r.cfg.Delivery == AtMostOnce, Reconcile: r.reconcile != nil, Except: r.except(),
	})
	if err != nil {
		return 0, err
	}
	for _, n := range res.Failed {
		r.logFailed(n, n.LastError)
	}
	items := make([]item, len(res.Claimed))
	var siblings []*item
	r.mu.Lock()
	for i := range items {
		it := &items[i]
		*it = item{Claimed: &res.Claimed[i], claimed: began, until: began.Add(r.cfg.Lease)}
		r.live[it] = struct{}{}
		switch {
		case !r.suspected(it):
		case r.suspect == nil:
			r.suspect = it
		default:
			siblings = append(siblings, it)
			r.apart = append(r.apart, it.ID)
			continue
		}
		r.waiting = append(r.waiting, it)
	}
	r.settled += len(res.Failed)
	r.taken += len(siblings)
	r.mu.Unlock()
	for _, it := range siblings {
		r.finish(it, outbox.Settlement{Verdict: outbox.HandedBack, Unknown: true})
	}
	signal(r.toSend)
	return len(res.Claimed) + len(res.Failed), nil
}

// suspected reports whether it is on its last attempt and the one before left no
// result. It may be a message that kills its process; more likely it waited in the same batch
// as one, which cost it attempts all the same. So that it is not failed for that, such
// rows are delivered one after the other, each while the others have been handed back.
func (r *run) suspected(it *item) bool {
	return it.UnknownVersion > 0 && r.cfg.MaxAttempts > 0 && it.Notification.Attempts >= r.cfg.MaxAttempts
}

// alone reports whether it is not suspected, or no other row at hand is.
func (r *run) alone(it *item) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if it != r.suspect {
		return true
	}
	for other := range r.live {
		if other != it && r.suspected(other) {
			return false
		}
	}
	return true
}

// forget is called under the lock when it is no longer this relay's.
func (r *run) forget(it *item) {
	delete(r.live, it)
	if it == r.suspect {
		r.suspect, r.apart = nil, nil
		r.Wake()
	}
}

// except returns the rows of this relay. Their leases may have ended by the time that the
// database gets to a claim, however well they are renewed now: a server that was frozen
// does first of all what it was last asked, also if nobody waits for the answer. The rows
// are not to be sent again by the one that knows their result. Nor are those to be
// claimed that wait for a suspect's end.
func (r *run) except() []int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	ids := slices.Clone(r.apart)
	for it := range r.live {
		ids = append(ids, it.ID)
	}
	return ids
}

// callTimeout bounds each call of the queue, so that a dead connection does not
// cost the leases.
func (r *run) callTimeout() time.Duration { return r.cfg.Lease / 3 }

// work sends waiting rows until none will come any more, or ctx ends.
func (r *run) work(ctx, sendCtx context.Context) {
	over := false
	defer func() {
		if !over { // the sender called runtime.Goexit
			go r.work(ctx, sendCtx)
			return
		}
		r.mu.Lock()
		r.workers--
		r.mu.Unlock()
		signal(r.toSend) // for the next one to end
		signal(r.progress)
	}()
	trouble := outage{log: r.log, doing: "renew a lease"}
	for {
		it := r.next(ctx)
		if it == nil {
			over = true
			return
		}
		if r.ready(ctx, it, &trouble) {
			r.deliver(sendCtx, it)
		}
	}
}

// next takes the first waiting row that may be tried. It returns nil when none will
// come, or ctx ends.
func (r *run) next(ctx context.Context) *item {
	for ctx.Err() == nil {
		it, wait := r.take()
		if it != nil {
			return it
		}
		r.mu.Lock()
		over := r.closed && len(r.waiting) == 0
		r.mu.Unlock()
		if over {
			return nil
		}
		waitFor(ctx, r.toSend, wait)
	}
	return nil
}

// take takes the first waiting row that may be tried. Where there is none, it says
// how long to wait for one, -1 if none waits.
func (r *run) take() (it *item, wait time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	wait = -1
	for i, it := range r.waiting {
		if !it.notBefore.IsZero() {
			if d := time.Until(it.notBefore); d > 0 {
				if wait < 0 || d < wait {
					wait = d
				}
				continue
			}
		}
		if i == 0 {
			r.waiting = r.waiting[1:]
		} else {
			r.waiting = slices.Delete(r.waiting, i, i+1)
		}
		r.taken++
		if len(r.waiting) > 0 {
			signal(r.toSend) // for another worker
		}
		if len(r.waiting) <= r.cfg.BatchSize/2 {
			signal(r.room)
		}
		return it, 0
	}
	return nil, wait
}

// waitFor waits for a signal, at most for d unless that is negative, or until ctx ends.
func waitFor(ctx context.Context, c <-chan struct{}, d time.Duration) {
	var timeout <-chan time.Time
	if d >= 0 {
		timer := time.NewTimer(d)
		defer timer.Stop()
		timeout = timer.C
	}
	select {
	case <-c:
	case <-timeout:
	case <-ctx.Done():
	}
}

// ready waits for the limiter and makes sure that the lease of it holds. Where it is
// false the row has been dealt with, or waits again.
func (r *run) ready(ctx context.Context, it *item, trouble *outage) bool {
	if !r.alone(it) {
		r.wait(it, firstPause)
		return false
	}
	if r.cfg.Limiter != nil {
		if err := r.cfg.Limiter.Wait(ctx); err != nil {
			r.wait(it, r.cfg.PollInterval)
			if ctx.Err() == nil {
				// Its burst was set to 0, or ctx will end before its turn.
				r.log.LogAttrs(ctx, slog.LevelError, "outbox: the limiter lets nothing pass", slog.String("error", err.Error()))
				_ = sleep(ctx, r.cfg.PollInterval)
			}
			return false
		}
	}
	for {
		r.mu.Lock()
		_, mine := r.live[it]
		left := leaseLeft(it)
		r.mu.Unlock()
		if !mine {
			r.untake() // the lease was lost meanwhile
			return false
		}
		if left >= min(r.cfg.SendTimeout, r.cfg.Lease/2) {
			break
		}
		// The process was frozen or the database away; else the lease had been renewed.
		held, err := r.extend(ctx, []*item{it})
		if err != nil {
			if ctx.Err() == nil {
				trouble.began(err)
			}
			if sleep(ctx, trouble.pause()) != nil {
				r.wait(it, 0)
				return false
			}
			continue
		}
		trouble.ended()
		if held {
			it.tries++
			r.wait(it, heldPause(it.tries))
			return false
		}
	}
	n := &it.Notification
	if !n.NotAfter.IsZero() && !it.Expired && time.Since(it.claimed) >= n.NotAfter.Sub(n.LockedAt) {
		r.finish(it, outbox.Settlement{Verdict: outbox.Failed, Error: "expired: not delivered before " + n.NotAfter.String()})
		return false
	}
	return true
}

// leaseLeft is how long the lease of it holds at least. The monotonic clock stands
// still while a machine is suspended, and the wall clock may jump: the worse of the
// two only costs a renewal.
func leaseLeft(it *item) time.Duration {
	now := time.Now()
	return min(it.until.Sub(now), it.until.Round(0).Sub(now.Round(0)))
}

// wait puts it back behind those that wait to be sent, for d.
func (r *run) wait(it *item, d time.Duration) {
	r.mu.Lock()
	_, mine := r.live[it]
	ended := r.ended
	if mine && !ended {
		it.notBefore = time.Now().Add(d)
		r.waiting = append(r.waiting, it)
	}
	r.mu.Unlock()
	if mine && ended {
		r.finish(it, handedBack(it))
		return
	}
	r.untake()
	signal(r.toSend)
}

// untake says that a row that was taken has been put back or lost.
func (r *run) untake() {
	r.mu.Lock()
	r.taken--
	r.mu.Unlock()
	signal(r.progress)
}

// heldPause is how long to leave a row alone that a caller holds, the n-th time.
func heldPause(n int) time.Duration { return min(5*time.Millisecond<<min(n, 10), 50*time.Millisecond) }

// deliver sends one message. Whatever the sender does, it ends with a settlement.
func (r *run) deliver(ctx context.Context, it *item) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.SendTimeout)
	r.mu.Lock()
	it.cancel = cancel
	r.mu.Unlock()
	var st outbox.Settlement
	returned := false
	defer func() {
		if !returned { // the sender called runtime.Goexit
			st = r.judge(it, errGoexit)
		}
		cancel()
		r.finish(it, st)
	}()
	st = r.attempt(ctx, it)
	returned = true
}

// handBack gives back what still waits, and has all that is put back given back, too.
func (r *run) handBack() {
	r.mu.Lock()
	r.ended = true
	waiting := r.waiting
	r.waiting = nil
	r.taken += len(waiting)
	r.mu.Unlock()
	for _, it := range waiting {
		r.finish(it, handedBack(it))
	}
}

func handedBack(it *item) outbox.Settlement {
	return outbox.Settlement{Verdict: outbox.HandedBack, Unknown: it.UnknownVersion > 0}
}

// finish has it, which was taken, settled.
func (r *run) finish(it *item, st outbox.Settlement) {
	st.Lease = it.Lease
	r.mu.Lock()
	it.settlement, it.tries, it.notBefore = st, 0, time.Time{}
	r.finished = append(r.finished, it)
	r.unsettled++
	r.taken--
	r.mu.Unlock()
	signal(r.toSettle)
	signal(r.progress)
}

// settle settles what is finished, as much at a time as has come together, until ctx
// ends.
func (r *run) settle(ctx context.Context) {
	trouble := outage{log: r.log, doing: "settle"}
	limit := maxSettle
	for ctx.Err() == nil {
		batch, wait := r.takeFinished(limit)
		if len(batch) == 0 {
			waitFor(ctx, r.toSettle, wait)
			if r.busy() {
				_ = sleep(ctx, gatherTime)
			}
			continue
		}
		settlements := make([]outbox.Settlement, len(batch))
		for i, it := range batch {
			settlements[i] = it.settlement
		}
		call, cancel := context.WithTimeout(ctx, r.callTimeout())
		results, err := r.queue.Settle(call, settlements)
		cancel()
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			// If one row is to blame, halves leave the others free of it.
			limit = max(1, len(batch)/2)
			r.settleAgain(batch)
			trouble.began(err)
			_ = sleep(ctx, trouble.pause())
			continue
		}
		trouble.ended()
		limit = min(2*limit, maxSettle)
		r.noteSettled(batch, results)
	}
}

// busy reports whether more is being sent.
func (r *run) busy() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.waiting)+r.taken > 0
}

// takeFinished takes up to limit rows that are to be settled now; where there are
// none, it says how long to wait for the first, -1 if there is none at all.
func (r *run) takeFinished(limit int) (batch []*item, wait time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	wait = -1
	rest := r.finished[:0]
	for _, it := range r.finished {
		d := time.Duration(0)
		if !it.notBefore.IsZero() {
			d = time.Until(it.notBefore)
		}
		switch {
		case d <= 0 && len(batch) < limit:
			batch = append(batch, it)
			continue
		case wait < 0 || d < wait:
			wait = max(d, 0)
		}
		rest = append(rest, it)
	}
	clear(r.finished[len(rest):])
	r.finished = rest
	return batch, wait
}

// settleAgain puts back what a failed call may or may not have settled.
func (r *run) settleAgain(batch []*item) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failing = true
	for _, it := range batch {
		it.maybeDone = true
	}
	if len(batch) > 1 {
		r.finished = append(batch, r.finished...)
		return
	}
	batch[0].tries++
	batch[0].notBefore = time.Now().Add(heldPause(batch[0].tries))
	r.finished = append(r.finished, batch[0])
}

// noteSettled takes note of what became of a batch.
func (r *run) noteSettled(batch []*item, results []outbox.LeaseResult) {
	wake := false
	r.mu.Lock()
	r.failing = false
	for i, it := range batch {
		if results[i] == outbox.LeaseHeld {
			it.tries++
			it.notBefore = time.Now().Add(heldPause(it.tries))
			r.finished = append(r.finished, it)
			continue
		}
		r.forget(it)
		r.unsettled--
		if results[i] != outbox.LeaseStale && it.settlement.Verdict != outbox.HandedBack {
			r.settled++
		}
		// Something is due at once: newer content, or content that the provider turned out not to have.
		wake = wake || results[i] == outbox.LeaseSuperseded || it.settlement.Verdict == outbox.HandedBack
	}
	r.mu.Unlock()
	for i, it := range batch {
		r.logSettled(it, results[i])
	}
	if wake {
		r.Wake()
	}
	signal(r.room)
	signal(r.progress)
}

// renew keeps the leases of all that is not settled, until ctx ends.
func (r *run) renew(ctx context.Context) {
	trouble := outage{log: r.log, doing: "renew leases"}
	for sleep(ctx, r.cfg.Lease/6) == nil {
		for {
			var soon []*item
			r.mu.Lock()
			for it := range r.live {
				if leaseLeft(it) < r.cfg.Lease*2/3 && len(soon) < maxSettle {
					soon = append(soon, it)
				}
			}
			r.mu.Unlock()
			if len(soon) == 0 {
				break
			}
			held, err := r.extend(ctx, soon)
			if err != nil && ctx.Err() == nil {
				trouble.began(err)
			}
			if err != nil || held {
				break // again after a pause
			}
			trouble.ended()
		}
	}
}

// extend renews leases. held: some rows are locked by callers and were not. What
// turns out to be another's is given up.
func (r *run) extend(ctx context.Context, items []*item) (held bool, err error) {
	leases := make([]outbox.Lease, len(items))
	for i, it := range items {
		leases[i] = it.Lease
	}
	call, cancel := context.WithTimeout(ctx, r.callTimeout())
	defer cancel()
	began := time.Now()
	results, err := r.queue.Extend(call, leases, r.cfg.Lease)
	if err != nil {
		return false, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, it := range items {
		switch results[i] {
		case outbox.LeaseDone:
			it.until = began.Add(r.cfg.Lease)
		case outbox.LeaseHeld:
			held = true
		case outbox.LeaseStale:
			r.lose(it)
		}
	}
	return held, nil
}

// lose gives up a row that another has claimed: what waits is dropped, and a Send
// under way is told to end. What is finished is left for its settlement to show.
func (r *run) lose(it *item) {
	if _, mine := r.live[it]; !mine {
		return // two calls have found it out
	}
	if it.cancel != nil || it.settlement.Verdict != "" {
		if it.cancel != nil {
			it.cancel()
		}
		it.until = time.Now().Add(r.cfg.Lease) // not to be asked about again soon
		return
	}
	r.forget(it)
	if i := slices.Index(r.waiting, it); i >= 0 {
		r.waiting = slices.Delete(r.waiting, i, i+1)
	}
	r.log.LogAttrs(context.Background(), slog.LevelWarn, "outbox: a lease was lost before its message was sent", attrs(it.Notification)...)
}

// outage reports the begin and the end of a trouble, and once a minute in between.
// It belongs to one goroutine.
type outage struct {
	log      *slog.Logger
	doing    string
	failures int
	since    time.Time
	logged   time.Time
}

func (o *outage) began(err error) {
	now := time.Now()
	if o.failures++; o.failures == 1 {
		o.since = now
	}
	if o.failures == 1 || now.Sub(o.logged) >= time.Minute {
		o.logged = now
		o.log.LogAttrs(context.Background(), slog.LevelWarn, "outbox: the relay cannot "+o.doing+" and tries again",
			slog.String("error", err.Error()), slog.Int("failures", o.failures), slog.Duration("for", now.Sub(o.since)))
	}
}

func (o *outage) ended() {
	if o.failures > 0 {
		o.log.LogAttrs(context.Background(), slog.LevelInfo, "outbox: the relay can "+o.doing+" again",
			slog.Int("failures", o.failures), slog.Duration("after", time.Since(o.since)))
		o.failures = 0
	}
}

// pause is 50 ms after the first failure, doubled up to 5 s, half of it random.
func (o *outage) pause() time.Duration {
	d := min(50*time.Millisecond<<min(max(o.failures-1, 0), 10), 5*time.Second)
	return d/2 + rand.N(d/2)
}
