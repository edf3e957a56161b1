//! A pool's file system as others reach it: never on the runtime's own threads, since a network file system may not answer for hours,
//! and never by more threads than a few.
//!
//! ```text
//!   Room::look ──▶ one thread asks ──answers──▶ figures
//!        │ deadline                    └─ not yet: the last figures, and since when it is silent
//!   Room::run ──▶ a place of few ──▶ a thread works ──▶ its result, or: it does not answer
//! ```

use std::{
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use image::Capacity;
use model::Timestamp;
use tokio::sync::{Semaphore, watch};

use crate::shared::lock;

/// Threads that work on one pool at once, besides the one that measures it.
const THREADS_MAX: usize = 4;

/// Why nothing came of work on a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RoomError {
    /// Its file system did not answer in time; what was asked may still happen.
    #[error("its file system does not answer")]
    Silent,
    /// The work ended by itself, which is a defect.
    #[error("the work broke off")]
    BrokeOff,
}

/// What is known of a pool's room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Figures {
    /// The last that was known, if any ever was.
    pub(crate) capacity: Option<Capacity>,
    /// Since when nobody has answered, by this host's clock.
    pub(crate) silent_since: Option<Timestamp>,
}

/// One pool's room.
#[derive(Debug)]
pub(crate) struct Room {
    /// When the look that is under way began.
    asking: Mutex<Option<Timestamp>>,
    /// The last figures; each answer is a change.
    seen: watch::Sender<Option<Capacity>>,
    places: Arc<Semaphore>,
}

impl Default for Room {
    fn default() -> Self {
        Self {
            asking: Mutex::default(),
            seen: watch::Sender::new(None),
            places: Arc::new(Semaphore::new(THREADS_MAX)),
        }
    }
}

impl Room {
    /// Measures by `measure` on a thread of its own, unless the last one still waits; the figures after at most `limit`. `None` of
    /// `measure` keeps the last figures.
    pub(crate) async fn look<F>(self: &Arc<Self>, measure: F, limit: Duration) -> Figures
    where
        F: FnOnce() -> Option<Capacity> + Send + 'static,
    {
        let mut answers = self.seen.subscribe();
        let begins = lock(&self.asking).replace_if_none(now());
        if begins {
            let room = Arc::clone(self);
            tokio::task::spawn_blocking(move || {
                let done = Done(&room);
                let seen = measure();
                drop(done);
                room.seen.send_modify(|last| *last = seen.or(*last));
            });
        }
        // Its own answer, or that of the one that waits already; or neither, in time.
        let _ = tokio::time::timeout(limit, answers.changed()).await;
        self.figures()
    }

    /// What is known now.
    pub(crate) fn figures(&self) -> Figures {
        Figures {
            capacity: *self.seen.borrow(),
            silent_since: *lock(&self.asking),
        }
    }

    /// Runs `work` on a thread, when one of the pool's few is free; its result within `limit`.
    pub(crate) async fn run<T, F>(&self, work: F, limit: Duration) -> Result<T, RoomError>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let places = Arc::clone(&self.places);
        let run = async move {
            let place = places.acquire_owned().await.map_err(|_| RoomError::BrokeOff)?;
            let working = tokio::task::spawn_blocking(move || {
                let done = work();
                // A thread that hangs keeps its place, also when nobody waits for it any more.
                drop(place);
                done
            });
            working.await.map_err(|_| RoomError::BrokeOff)
        };
        tokio::time::timeout(limit, run).await.map_err(|_| RoomError::Silent)?
    }
}

/// A look that is under way; also one that panics ends.
struct Done<'r>(&'r Room);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        *lock(&self.0.asking) = None;
    }
}

trait ReplaceIfNone<T> {
    fn replace_if_none(&mut self, value: T) -> bool;
}

impl<T> ReplaceIfNone<T> for Option<T> {
    /// Whether it was `None`.
    fn replace_if_none(&mut self, value: T) -> bool {
        let none = self.is_none();
        if none {
            *self = Some(value);
        }
        none
    }
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends where its promise is broken")]

    use std::sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    };

    use super::*;

    const SOON: Duration = Duration::from_millis(20);
    const LATE: Duration = Duration::from_secs(20);
    const ROOM: Capacity = Capacity {
        total_bytes: 10,
        free_bytes: 5,
    };

    #[tokio::test]
    async fn a_pool_that_hangs_holds_nobody_up_and_is_asked_once() {
        let room = Arc::new(Room::default());
        let fine = room.look(|| Some(ROOM), LATE).await;
        assert_eq!((fine.capacity, fine.silent_since), (Some(ROOM), None));
        let (answer, hangs) = mpsc::channel::<()>();
        let asked = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&asked);
        let measure = move || {
            count.fetch_add(1, Ordering::SeqCst);
            hangs.recv().ok().map(|()| ROOM)
        };
        let first = room.look(measure, SOON).await;
        assert_eq!(first.capacity, Some(ROOM), "the last that was known");
        assert!(first.silent_since.is_some());
        let count = Arc::clone(&asked);
        let again = move || {
            count.fetch_add(1, Ordering::SeqCst);
            None
        };
        let second = room.look(again, SOON).await;
        assert_eq!(second.silent_since, first.silent_since, "since then, not since now");
        assert_eq!(asked.load(Ordering::SeqCst), 1, "one thread at most hangs");
        let mut answers = room.seen.subscribe();
        answer.send(()).unwrap();
        answers.changed().await.unwrap();
        assert_eq!(room.figures().silent_since, None);
    }

    #[tokio::test]
    async fn work_on_a_pool_that_hangs_is_refused_in_time_and_takes_few_threads() {
        let room = Room::default();
        let mut held = vec![];
        for _ in 0..THREADS_MAX {
            let (answer, hangs) = mpsc::channel::<()>();
            held.push(answer);
            let hung = room.run(move || hangs.recv().is_ok(), SOON).await;
            assert_eq!(hung, Err(RoomError::Silent));
        }
        let ran = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&ran);
        let refused = room.run(move || count.fetch_add(1, Ordering::SeqCst), SOON).await;
        assert_eq!((refused, ran.load(Ordering::SeqCst)), (Err(RoomError::Silent), 0));
        held.pop();
        assert_eq!(room.run(|| 7, LATE).await, Ok(7), "a place is free again");
    }
}
