//! A thread pool for the short steps of a forward pass, shared by many callers.
//!
//! A pass has some hundred steps of 10 µs to 1 ms. Waking a sleeping thread costs as much as a short
//! step, so that workers spin a little before they sleep. Whoever calls works too, and takes up the
//! tasks of a worker that does not come: nothing ever waits for a thread that is not running.
//!
//! Steps that follow each other and touch the same numbers cut them alike and name the thread of each
//! task ([`Turn::for_each_own`]), so that the numbers stay in the cache of one core.
//!
//! Callers take a [`Turn`] first, and no more turns are given out than there are threads. While `n`
//! turns are out, `n − 1` workers stay asleep, since the callers themselves use those cores.
//!
//! A process made by `fork` has none of its parent's threads. The pool notices the new process id
//! and starts afresh.

use std::{
    any::Any,
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    ptr,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, Once, PoisonError,
        atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle, Thread},
};

/// Polls of an idle worker before it sleeps, some 50 µs.
const SPINS_BEFORE_SLEEP: u32 = 2_000;

/// Polls of a caller for the last tasks before it offers its core to others.
const SPINS_BEFORE_YIELD: u32 = 2_000;

thread_local! {
    /// Number of this thread in its team; callers have the first place.
    static SEAT: Cell<usize> = const { Cell::new(0) };
}

/// A pool of a fixed number of threads, the caller's own included.
#[derive(Debug)]
pub struct Pool {
    threads: usize,
    /// From `Arc::into_raw`; replaced only in a forked process.
    team: AtomicPtr<Team>,
}

impl Pool {
    /// A pool of `threads` threads (at least one), or of as many as affinity and cgroup quota let
    /// this process use. They start when first needed.
    pub fn new(threads: Option<usize>) -> Self {
        let threads = threads
            .unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from))
            .clamp(1, u32::MAX as usize);
        Self { threads, team: AtomicPtr::new(Arc::into_raw(Team::new(threads)).cast_mut()) }
    }

    /// Number of threads, the caller's own included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Waits until fewer than [`Pool::threads`] turns are out and takes one.
    pub fn turn(&self) -> Turn {
        let team = self.team();
        let mut turns = team.lock_turns();
        while *turns >= self.threads {
            turns = team.turn_given_back.wait(turns).unwrap_or_else(PoisonError::into_inner);
        }
        *turns += 1;
        team.turns_out.store(*turns, Ordering::Relaxed);
        drop(turns);
        Turn { team: Some(team) }
    }

    /// The team of this process.
    fn team(&self) -> Arc<Team> {
        loop {
            let current = self.team.load(Ordering::Acquire);
            // SAFETY: `current` came from `Arc::into_raw`, and its count of one is given up only by
            // `drop`, which has exclusive access. In a forked child the parent's is never given up.
            let team = unsafe {
                Arc::increment_strong_count(current);
                Arc::from_raw(current)
            };
            if team.process == std::process::id() {
                return team;
            }
            let fresh = Arc::into_raw(Team::new(self.threads)).cast_mut();
            let swap =
                self.team.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire);
            if swap.is_err() {
                // SAFETY: `fresh` came from `Arc::into_raw` above and nobody else has seen it.
                drop(unsafe { Arc::from_raw(fresh) });
            }
            // The parent's team is left alone: its lock may be held by a thread that is not here.
            std::mem::forget(team);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `Arc::into_raw`, and `&mut self` excludes every other use.
        let team = unsafe { Arc::from_raw(*self.team.get_mut()) };
        if team.process == std::process::id() {
            team.stop();
        } else {
            std::mem::forget(team);
        }
    }
}

/// The right to run steps on the pool. Given back when dropped.
#[derive(Debug)]
pub struct Turn {
    /// `None` on one thread alone.
    team: Option<Arc<Team>>,
}

impl Turn {
    /// Steps run on the calling thread alone, which needs no turn.
    pub(crate) fn alone() -> Self {
        Self { team: None }
    }

    /// Number of threads of the pool.
    pub fn threads(&self) -> usize {
        self.team.as_ref().map_or(1, |team| team.workers.len() + 1)
    }

    /// How many threads, the caller's own included, are not taken up by other turns at present.
    pub fn free_threads(&self) -> usize {
        1 + self.team.as_ref().map_or(0, |team| team.helpers_per_turn())
    }

    /// Calls `run(i)` once for every `i` below `tasks`, on this thread and on idle workers, and
    /// returns when all calls have returned.
    ///
    /// # Panics
    /// When a call panics; the others are still made, but for the later ones of a step that runs on
    /// this thread alone.
    pub fn for_each(&self, tasks: usize, run: impl Fn(usize) + Sync) {
        let team = match &self.team {
            Some(team) if tasks > 1 => team,
            _ => return (0..tasks).for_each(run),
        };
        let helpers = team.helpers_per_turn();
        let alone = helpers == 0 || team.busy.swap(true, Ordering::Acquire);
        if alone {
            (0..tasks).for_each(run);
        } else {
            let panic = team.run(&Step { run: &run, tasks }, helpers);
            team.busy.store(false, Ordering::Release);
            if let Some(panic) = panic {
                resume_unwind(panic);
            }
        }
    }

    /// [`Turn::for_each`] in which thread `i` of the pool makes call `i`, or another one that is done
    /// with its own before thread `i` has come.
    ///
    /// # Panics
    /// As [`Turn::for_each`].
    pub fn for_each_own(&self, tasks: usize, run: impl Fn(usize) + Sync) {
        let taken: Vec<_> = (0..tasks).map(|_| AtomicBool::new(false)).collect();
        let take = |task: &usize| !taken[*task].swap(true, Ordering::Relaxed);
        self.for_each(tasks, |_| {
            let seat = SEAT.get();
            // There are as many calls as tasks, so that one is left for each.
            (seat..tasks).chain(0..seat.min(tasks)).find(take).into_iter().for_each(&run);
        });
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(team) = &self.team else { return };
        let mut turns = team.lock_turns();
        *turns -= 1;
        team.turns_out.store(*turns, Ordering::Relaxed);
        drop(turns);
        team.turn_given_back.notify_one();
    }
}

/// One call of [`Turn::for_each`], on its caller's stack.
struct Step<'a> {
    run: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
}

/// What the threads of one process share.
#[derive(Debug)]
struct Team {
    process: u32,
    turns: Mutex<usize>,
    turn_given_back: Condvar,
    /// Copy of `turns` that can be read without the lock.
    turns_out: AtomicUsize,
    /// Whether a step is being run on the workers.
    busy: AtomicBool,
    /// Number of the step in the upper half, its unclaimed tasks in the lower half.
    ticket: AtomicU64,
    /// The step, a `*const Step`; valid while one of its tasks is claimed and unfinished.
    step: AtomicPtr<()>,
    /// Tasks of the step that have not returned.
    unfinished: AtomicUsize,
    /// How many workers may take part in the step.
    helpers: AtomicU32,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stopping: AtomicBool,
    workers: Box<[Worker]>,
    started: Once,
    handles: Mutex<Vec<JoinHandle<()>>>,
}

/// Where one worker is.
#[derive(Debug, Default)]
struct Worker {
    asleep: AtomicBool,
    thread: std::sync::OnceLock<Thread>,
}

impl Team {
    fn new(threads: usize) -> Arc<Self> {
        Arc::new(Self {
            process: std::process::id(),
            turns: Mutex::new(0),
            turn_given_back: Condvar::new(),
            turns_out: AtomicUsize::new(0),
            busy: AtomicBool::new(false),
            ticket: AtomicU64::new(0),
            step: AtomicPtr::new(ptr::null_mut()),
            unfinished: AtomicUsize::new(0),
            helpers: AtomicU32::new(0),
            panic: Mutex::new(None),
            stopping: AtomicBool::new(false),
            workers: (1..threads).map(|_| Worker::default()).collect(),
            started: Once::new(),
            handles: Mutex::new(Vec::new()),
        })
    }

    fn lock_turns(&self) -> MutexGuard<'_, usize> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Workers that may take part in the steps of a turn: callers use the cores of the others.
    fn helpers_per_turn(&self) -> usize {
        (self.workers.len() + 1).saturating_sub(self.turns_out.load(Ordering::Relaxed))
    }

    /// Runs a step with up to `helpers` workers; returns the payload of a task that panicked.
    ///
    /// Only the thread that set `busy` may call this.
    fn run(self: &Arc<Self>, step: &Step<'_>, helpers: usize) -> Option<Box<dyn Any + Send>> {
        self.started.call_once(|| self.start_workers());
        self.step.store(ptr::from_ref(step).cast_mut().cast(), Ordering::Relaxed);
        self.unfinished.store(step.tasks, Ordering::Relaxed);
        self.helpers.store(helpers as u32, Ordering::Relaxed);
        let number = (self.ticket.load(Ordering::Relaxed) >> 32) + 1;
        // Publishes the stores above. Sequentially consistent, so that either a worker going to
        // sleep sees the ticket, or this thread sees that it sleeps.
        self.ticket.store(number << 32 | step.tasks as u64, Ordering::SeqCst);
        for worker in &self.workers[..helpers] {
            let asleep = worker.asleep.load(Ordering::SeqCst);
            if asleep && worker.asleep.swap(false, Ordering::SeqCst) {
                worker.thread.get().inspect(|thread| thread.unpark());
            }
        }
        self.work();
        let mut polls = 0;
        while self.unfinished.load(Ordering::Acquire) > 0 {
            polls += 1;
            if polls < SPINS_BEFORE_YIELD { std::hint::spin_loop() } else { thread::yield_now() }
        }
        self.panic.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Takes up tasks of the present step until none is left.
    fn work(&self) {
        loop {
            let ticket = self.ticket.load(Ordering::Acquire);
            if ticket as u32 == 0 {
                return;
            }
            let claim = self.ticket.compare_exchange_weak(
                ticket,
                ticket - 1,
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            if claim.is_err() {
                continue;
            }
            // SAFETY: the claimed task counts as unfinished until the end of this loop, and the
            // step's owner keeps the step alive until none is. The number in the ticket makes sure
            // that the claim is one on this step.
            let step = unsafe { &*self.step.load(Ordering::Relaxed).cast::<Step<'_>>() };
            let index = step.tasks - (ticket as u32) as usize;
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (step.run)(index))) {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
            self.unfinished.fetch_sub(1, Ordering::Release);
        }
    }

    fn start_workers(self: &Arc<Self>) {
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, worker) in self.workers.iter().enumerate() {
            let team = Arc::clone(self);
            let started = thread::Builder::new()
                .name(format!("alknet-{}", index + 1))
                .spawn(move || team.serve(index));
            // Without the thread the callers do its work: slower, not wrong. It is not tried again:
            // where threads are limited, every step would lose time on it.
            if let Ok(handle) = started {
                _ = worker.thread.set(handle.thread().clone());
                handles.push(handle);
            }
        }
    }

    /// Life of worker `index`.
    fn serve(&self, index: usize) {
        SEAT.set(index + 1);
        let mut polls = 0;
        while !self.stopping.load(Ordering::Acquire) {
            let invited = index < self.helpers.load(Ordering::Relaxed) as usize;
            if invited && self.ticket.load(Ordering::Relaxed) as u32 > 0 {
                self.work();
                polls = 0;
            } else if polls < SPINS_BEFORE_SLEEP {
                std::hint::spin_loop();
                polls += 1;
            } else if invited && self.unfinished.load(Ordering::Relaxed) > 0 {
                // The next step is sure to come soon.
                thread::yield_now();
            } else {
                self.sleep(index);
                polls = 0;
            }
        }
    }

    /// Sleeps until a step invites worker `index`, or the team stops.
    fn sleep(&self, index: usize) {
        let asleep = &self.workers[index].asleep;
        asleep.store(true, Ordering::SeqCst);
        let called = || {
            let invited = index < self.helpers.load(Ordering::Relaxed) as usize;
            invited && self.ticket.load(Ordering::SeqCst) as u32 > 0
        };
        while asleep.load(Ordering::SeqCst) {
            if called() || self.stopping.load(Ordering::SeqCst) {
                asleep.store(false, Ordering::SeqCst);
                return;
            }
            thread::park();
        }
    }

    /// Ends the workers and waits for them.
    fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        for handle in handles.drain(..) {
            handle.thread().unpark();
            // A worker's panics are caught in `work`, so that there is nothing to pass on.
            _ = handle.join();
        }
    }
}

/// A slice that several tasks write to, each in places of its own.
pub(crate) struct Shared<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: access goes through `range`, whose callers keep the ranges of different threads apart.
unsafe impl<T: Send> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T> Shared<T> {
    /// Takes over the slice for as long as the tasks run.
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len() }
    }

    /// The same slice once more.
    pub(crate) fn again(&self) -> Self {
        Self { ..*self }
    }

    /// The `len` numbers from `start`, for tasks that write places of their own among those of others.
    ///
    /// # Panics
    /// When the range is outside the slice.
    pub(crate) fn places(&self, start: usize, len: usize) -> *mut T {
        assert!(start <= self.len && len <= self.len - start, "range outside the shared slice");
        self.start.wrapping_add(start)
    }

    /// The `len` numbers from `start`.
    ///
    /// # Safety
    /// No other task may touch this range, and the borrow given to [`Shared::new`] must still last.
    ///
    /// # Panics
    /// When the range is outside the slice.
    #[expect(clippy::mut_from_ref, reason = "tasks hold ranges that do not overlap")]
    pub(crate) unsafe fn range(&self, start: usize, len: usize) -> &mut [T] {
        // SAFETY: inside the slice; exclusive by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.places(start, len), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(Some(threads));
            let turn = pool.turn();
            for tasks in [0, 1, 2, 3, 100, 1000] {
                let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                turn.for_each(tasks, |i| _ = counts[i].fetch_add(1, Ordering::Relaxed));
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn every_task_runs_once_on_its_own_thread_or_another() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(Some(threads));
            let turn = pool.turn();
            for round in 0..200 {
                let tasks = round % (threads + 1);
                let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                turn.for_each_own(tasks, |i| _ = counts[i].fetch_add(1, Ordering::Relaxed));
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn tasks_stay_on_their_threads() {
        let pool = Pool::new(Some(2));
        let turn = pool.turn();
        let run = || {
            // Two tasks that wait for each other run on two threads.
            let (barrier, ids) = (std::sync::Barrier::new(2), Mutex::new([None; 2]));
            turn.for_each_own(2, |i| {
                barrier.wait();
                ids.lock().unwrap()[i] = Some(thread::current().id());
            });
            ids.into_inner().unwrap()
        };
        let first = run();
        assert_eq!(first[0], Some(thread::current().id()));
        assert!((0..50).all(|_| run() == first));
    }

    #[test]
    fn many_callers_share_it() {
        let pool = Pool::new(Some(4));
        thread::scope(|scope| {
            for caller in 0..16 {
                let pool = &pool;
                scope.spawn(move || {
                    for round in 0..50 {
                        let turn = pool.turn();
                        let sum = AtomicUsize::new(0);
                        for _ in 0..10 {
                            turn.for_each(20, |i| _ = sum.fetch_add(i + caller, Ordering::Relaxed));
                        }
                        let expected = 10 * (190 + 20 * caller);
                        assert_eq!(sum.into_inner(), expected, "round {round}");
                    }
                });
            }
        });
    }

    #[test]
    fn no_more_turns_than_threads() {
        let pool = Pool::new(Some(2));
        let (out, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let turn = pool.turn();
                    most.fetch_max(out.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    thread::yield_now();
                    out.fetch_sub(1, Ordering::SeqCst);
                    drop(turn);
                });
            }
        });
        assert!(most.into_inner() <= 2);
    }

    #[test]
    fn a_sleeping_worker_wakes_up() {
        let pool = Pool::new(Some(2));
        let turn = pool.turn();
        for _ in 0..20 {
            // Two tasks that wait for each other: they end only if the worker comes.
            let barrier = std::sync::Barrier::new(2);
            turn.for_each(2, |_| _ = barrier.wait());
            thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    #[test]
    fn workers_that_could_not_be_started_are_not_tried_again() {
        let pool = Pool::new(Some(3));
        let team = pool.team();
        team.started.call_once(|| ());
        let turn = pool.turn();
        for _ in 0..3 {
            let count = AtomicUsize::new(0);
            turn.for_each(10, |_| _ = count.fetch_add(1, Ordering::Relaxed));
            assert_eq!(count.into_inner(), 10);
        }
        assert!(team.handles.lock().unwrap().is_empty());
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(Some(2));
        let turn = pool.turn();
        let result = catch_unwind(AssertUnwindSafe(|| {
            turn.for_each(10, |i| assert!(i != 5, "task five"));
        }));
        assert!(result.is_err());
        let count = AtomicUsize::new(0);
        turn.for_each(10, |_| _ = count.fetch_add(1, Ordering::Relaxed));
        assert_eq!(count.into_inner(), 10);
    }
}
