//! A thread that wakes every millisecond and remembers the longest it had to wait.
//!
//! The clock of a stopped VM stands still, so the gap shows stalls of a running guest (a vCPU that got no time, a page that
//! had to come over the network); the blackout is seen from outside.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The largest gap since the last reset.
#[derive(Clone, Copy, Default)]
pub(crate) struct Gap {
    /// Microseconds between two ticks, at worst.
    pub(crate) largest_us: u64,
    /// Uptime in milliseconds when the largest gap ended.
    pub(crate) at_ms: u64,
    /// Uptime in milliseconds of the last reset.
    pub(crate) since_ms: u64,
}

/// The tick thread's results.
pub(crate) struct Ticks {
    started: Instant,
    count: Arc<AtomicU64>,
    gap: Arc<Mutex<Gap>>,
}

impl Ticks {
    /// Starts the thread.
    pub(crate) fn start(started: Instant) -> Self {
        let ticks = Ticks {
            started,
            count: Arc::default(),
            gap: Arc::default(),
        };
        let (count, gap) = (Arc::clone(&ticks.count), Arc::clone(&ticks.gap));
        std::thread::spawn(move || {
            let mut last = Instant::now();
            loop {
                std::thread::sleep(Duration::from_millis(1));
                let now = Instant::now();
                count.fetch_add(1, Ordering::Relaxed);
                let waited_us = (now - last).as_micros() as u64;
                let mut gap = crate::lock(&gap);
                if waited_us > gap.largest_us {
                    gap.largest_us = waited_us;
                    gap.at_ms = (now - started).as_millis() as u64;
                }
                last = now;
            }
        });
        ticks
    }

    /// How often the thread woke.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// The largest gap since the last reset.
    pub(crate) fn largest(&self) -> Gap {
        *crate::lock(&self.gap)
    }

    /// Forgets the largest gap.
    pub(crate) fn reset(&self) {
        let since_ms = self.started.elapsed().as_millis() as u64;
        *crate::lock(&self.gap) = Gap {
            largest_us: 0,
            at_ms: since_ms,
            since_ms,
        };
    }
}
