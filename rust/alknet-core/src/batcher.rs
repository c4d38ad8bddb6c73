//! Batcher: short texts of callers that wait for the engine are read in one pass.
//!
//! A pass over few tokens takes almost as long as one over many, since the weights have to be fetched
//! either way. A caller that finds the engine free reads at once, with the pieces of callers that wait
//! besides its own; one that does not leaves its pieces in a queue. A pass that ends wakes the first of
//! the queue but keeps nothing free for it: until it is awake a core would idle, and whoever comes before
//! reads its pieces too. No thread is needed for that, and no caller ever waits for others to come.

use std::{
    collections::VecDeque,
    iter, mem, process,
    sync::{
        Mutex, MutexGuard, PoisonError,
        mpsc::{Sender, channel},
    },
    thread,
};

use crate::{
    error::{Error, Result},
    model::TokenId,
};

/// Most tokens of a pass that is made of several callers' pieces; longer ones gain nothing by it.
const SHARED_TOKENS: usize = 256;

/// How often a caller tries to get at the queue, which others hold for a moment only.
const ATTEMPTS: usize = 64;

/// Reads pieces and returns what each says, in order.
type Read<'a, T> = &'a dyn Fn(&[&[TokenId]]) -> Result<Vec<T>>;

/// Shares the engine's passes among callers.
pub(crate) struct Batcher<T> {
    /// How many passes may run at the same time.
    passes: usize,
    queue: Mutex<Queue<T>>,
}

struct Queue<T> {
    /// A process made by `fork` has none of the callers that its parent had.
    process: u32,
    running: usize,
    waiting: VecDeque<Job<T>>,
    /// Jobs that have waited so far.
    jobs: u64,
}

/// Pieces that wait, and where their caller waits.
struct Job<T> {
    number: u64,
    pieces: Vec<Vec<TokenId>>,
    caller: Sender<Call<T>>,
}

/// What a waiting caller is told.
enum Call<T> {
    /// A pass has ended: if the pieces still wait, another may begin.
    Try,
    /// Somebody has read the pieces.
    Done(Result<Vec<T>>),
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { process: 0, running: 0, waiting: VecDeque::new(), jobs: 0 }
    }
}

impl<T> Batcher<T> {
    /// A batcher for an engine that makes so many passes at the same time.
    pub(crate) fn new(passes: usize) -> Self {
        Self { passes, queue: Mutex::default() }
    }

    /// What `pieces` say, read by this caller or by another one.
    ///
    /// # Errors
    /// As `read`; [`Error::Inference`] when another caller's pass ended in a panic.
    pub(crate) fn read(&self, pieces: &[&[TokenId]], read: Read<'_, T>) -> Result<Vec<T>> {
        let tokens = pieces.iter().map(|piece| piece.len()).sum();
        if tokens > SHARED_TOKENS {
            return read(pieces);
        }
        let Some(mut queue) = self.enter() else { return read(pieces) };
        if let Some(others) = queue.begin(self.passes, tokens) {
            drop(queue);
            let _pass = Pass { batcher: self };
            return lead(pieces, &others, read);
        }
        let (caller, called) = channel();
        let owned = pieces.iter().map(|piece| piece.to_vec()).collect();
        let number = queue.push(owned, caller);
        drop(queue);
        while let Ok(call) = called.recv() {
            if let Call::Done(result) = call {
                return result;
            }
            let mut queue = self.lock();
            if let Some(others) = queue.begin_waiting(self.passes, number) {
                drop(queue);
                let _pass = Pass { batcher: self };
                return lead(pieces, &others, read);
            }
        }
        Err(Error::Inference(
            "the pass that was to read this text failed: it was not screened".into(),
        ))
    }

    /// The queue, emptied in a new process; `None` while another caller is at it, which may be for
    /// ever in a forked process.
    fn enter(&self) -> Option<MutexGuard<'_, Queue<T>>> {
        let mut attempts = iter::repeat_with(|| self.queue.try_lock().ok()).take(ATTEMPTS);
        let mut queue = attempts.find_map(|queue| {
            queue.is_none().then(thread::yield_now);
            queue
        })?;
        if queue.process != process::id() {
            // The parent's callers are not here to be told: what they wait on is left alone.
            mem::forget(mem::take(&mut *queue));
            queue.process = process::id();
        }
        Some(queue)
    }

    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Queue<T> {
    /// Adds a job; returns its number.
    fn push(&mut self, pieces: Vec<Vec<TokenId>>, caller: Sender<Call<T>>) -> u64 {
        let number = self.jobs;
        self.jobs += 1;
        self.waiting.push_back(Job { number, pieces, caller });
        number
    }

    /// Begins a pass of so many tokens, if one may begin: the jobs that are to be read with it.
    fn begin(&mut self, passes: usize, tokens: usize) -> Option<Vec<Job<T>>> {
        if self.running == passes {
            return None;
        }
        self.running += 1;
        let mut sum = tokens;
        let fits = |job: &&Job<T>| {
            sum += job.n_tokens();
            sum <= SHARED_TOKENS
        };
        // The first goes with any pass, so that it never waits for ever.
        let n = self.waiting.iter().take_while(fits).count().max(1).min(self.waiting.len());
        let jobs = self.waiting.drain(..n).collect();
        if self.running < passes {
            self.wake();
        }
        Some(jobs)
    }

    /// [`Queue::begin`] for a job that waits, unless it has been taken.
    fn begin_waiting(&mut self, passes: usize, number: u64) -> Option<Vec<Job<T>>> {
        if self.running == passes {
            return None;
        }
        let place = self.waiting.iter().position(|job| job.number == number)?;
        let own = self.waiting.remove(place)?;
        self.begin(passes, own.n_tokens())
    }

    fn wake(&self) {
        if let Some(first) = self.waiting.front() {
            // A caller waits until its job is done, so that somebody is there to hear.
            _ = first.caller.send(Call::Try);
        }
    }
}

impl<T> Job<T> {
    fn n_tokens(&self) -> usize {
        self.pieces.iter().map(Vec::len).sum()
    }
}

/// A pass that runs; over when dropped, after a panic too.
struct Pass<'a, T> {
    batcher: &'a Batcher<T>,
}

impl<T> Drop for Pass<'_, T> {
    fn drop(&mut self) {
        let mut queue = self.batcher.lock();
        queue.running -= 1;
        queue.wake();
    }
}

/// Reads a caller's own pieces and those of other jobs in one pass; tells the others' callers.
fn lead<T>(own: &[&[TokenId]], others: &[Job<T>], read: Read<'_, T>) -> Result<Vec<T>> {
    if others.is_empty() {
        return read(own);
    }
    let theirs = others.iter().flat_map(|job| job.pieces.iter().map(Vec::as_slice));
    let all: Vec<_> = own.iter().copied().chain(theirs).collect();
    let mut together = read(&all).map(Vec::into_iter);
    let mut share = |pieces: &[&[TokenId]]| match &mut together {
        Ok(said) => Ok(said.take(pieces.len()).collect()),
        // One caller's text must not fail another's.
        Err(_) => read(pieces),
    };
    let result = share(own);
    for job in others {
        let pieces: Vec<_> = job.pieces.iter().map(Vec::as_slice).collect();
        // Its caller waits, unless its thread was ended.
        _ = job.caller.send(Call::Done(share(&pieces)));
    }
    result
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Barrier,
            atomic::{AtomicUsize, Ordering},
        },
        time::Duration,
    };

    use super::*;

    type Projections = Vec<f32>;

    /// Projections that say which tokens they are of; fails where a token is 0.
    fn echo(pieces: &[&[TokenId]]) -> Result<Vec<Projections>> {
        if pieces.iter().any(|piece| piece.contains(&0)) {
            return Err(Error::Input("token 0".into()));
        }
        Ok(pieces.iter().map(|piece| piece.iter().map(|id| *id as f32).collect()).collect())
    }

    /// Has so many callers read a piece each, and its first token, while a pass is made that ends when
    /// all of them wait; returns what they got and how many passes they made.
    fn behind_a_slow_pass(
        callers: u32,
        piece: impl Fn(u32) -> Vec<TokenId> + Sync,
        read: impl Fn(&[&[TokenId]]) -> Result<Vec<Projections>> + Sync,
    ) -> (Vec<Result<Vec<Projections>>>, usize) {
        let (batcher, passes, begun) = (Batcher::new(1), AtomicUsize::new(0), Barrier::new(2));
        let slow = |pieces: &[&[TokenId]]| {
            begun.wait();
            while batcher.queue.lock().unwrap().waiting.len() < callers as usize {
                thread::sleep(Duration::from_millis(1));
            }
            echo(pieces)
        };
        let counted = |pieces: &[&[TokenId]]| {
            passes.fetch_add(1, Ordering::Relaxed);
            read(pieces)
        };
        let caller = |i| {
            let own = piece(i);
            batcher.read(&[&own, &own[..1]], &counted)
        };
        let results = thread::scope(|scope| {
            let first = scope.spawn(|| batcher.read(&[&[1]], &slow));
            begun.wait();
            let caller = &caller;
            let threads: Vec<_> = (0..callers).map(|i| scope.spawn(move || caller(i))).collect();
            first.join().unwrap().unwrap();
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| panicked())).collect()
        });
        assert_eq!(batcher.queue.lock().unwrap().running, 0, "a pass was never handed over");
        (results, passes.into_inner())
    }

    fn panicked() -> Result<Vec<Projections>> {
        Err(Error::Inference("panicked".into()))
    }

    #[test]
    fn alone_a_caller_reads_at_once() {
        let batcher = Batcher::new(2);
        for _ in 0..3 {
            assert_eq!(batcher.read(&[&[1, 2], &[3]], &echo).unwrap(), [vec![1.0, 2.0], vec![3.0]]);
        }
        assert!(batcher.read(&[&[0]], &echo).is_err());
        assert!(batcher.read(&[], &echo).unwrap().is_empty());
        assert_eq!(batcher.queue.lock().unwrap().running, 0);
    }

    #[test]
    fn those_who_wait_are_read_together_and_get_their_own() {
        let (results, passes) = behind_a_slow_pass(20, |i| vec![i + 1; 9], echo);
        for (i, result) in results.into_iter().enumerate() {
            let own = (i + 1) as f32;
            assert_eq!(result.unwrap(), [vec![own; 9], vec![own]]);
        }
        assert_eq!(passes, 1, "20 callers of 10 tokens");
    }

    #[test]
    fn a_pass_takes_no_more_than_fit() {
        let (results, passes) = behind_a_slow_pass(6, |i| vec![i + 1; 99], echo);
        assert!(results.iter().all(Result::is_ok));
        assert_eq!(passes, 3, "6 callers of 100 tokens, {SHARED_TOKENS} a pass");
    }

    #[test]
    fn one_callers_failure_is_its_own() {
        let (results, _) = behind_a_slow_pass(5, |i| vec![i; 3], echo);
        let failed: Vec<_> = results.iter().map(Result::is_err).collect();
        assert_eq!(failed, [true, false, false, false, false]);
    }

    #[test]
    fn a_panic_leaves_nobody_waiting() {
        let (results, _) =
            behind_a_slow_pass(4, |i| vec![i + 1; 3], |_| panic!("what the test is about"));
        assert!(results.iter().all(Result::is_err));
    }

    #[test]
    fn a_forked_process_starts_afresh() {
        let batcher = Batcher::new(1);
        let (caller, called) = channel();
        let job = Job { number: 0, pieces: vec![vec![1]], caller };
        // What the child of a process with a pass and a caller waiting finds.
        *batcher.queue.lock().unwrap() =
            Queue { process: process::id() + 1, running: 1, waiting: [job].into(), jobs: 1 };
        assert_eq!(batcher.read(&[&[7]], &echo).unwrap(), [vec![7.0]]);
        assert!(called.try_recv().is_err());
        // Its lock may be held for ever by a thread that is not here.
        let _held = batcher.queue.lock().unwrap();
        assert_eq!(batcher.read(&[&[7]], &echo).unwrap(), [vec![7.0]]);
    }

    #[test]
    fn long_pieces_do_not_wait() {
        let batcher = Batcher::new(1);
        let long = vec![1; SHARED_TOKENS + 1];
        let within = |pieces: &[&[TokenId]]| {
            batcher.read(&[&long], &echo)?;
            echo(pieces)
        };
        assert!(batcher.read(&[&[1]], &within).is_ok());
    }
}
