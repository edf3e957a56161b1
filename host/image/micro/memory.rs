//! The memory writer: rewrites a working set at a set rate, and first checks that each page still holds what it wrote.
//!
//! Word `i` of page `p` in pass `n` is `mix(p, n) + i * GOLDEN`: every word of every page changes in every pass, and neither
//! compression nor delta encoding makes it small.

use crate::stream::{GOLDEN, mix};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const PAGE_WORDS: usize = 4096 / 8;
const PAGES_PER_MIB: usize = 256;
/// Pages between two looks at the clock and at the stop flag.
const BATCH_PAGES: usize = 64;

/// One run of the writer.
#[derive(Default)]
struct Run {
    stop: AtomicBool,
    mib: u64,
    rate_mib_s: u64,
    passes: AtomicU64,
    pages_written: AtomicU64,
    mismatches: AtomicU64,
}

/// The writer, idle or with one run.
#[derive(Default)]
pub(crate) struct Writer {
    current: Mutex<Option<(Arc<Run>, std::thread::JoinHandle<()>)>>,
    /// Mismatches of runs that ended: they are never forgotten.
    past_mismatches: AtomicU64,
}

impl Writer {
    /// Replaces the run: `mib` MiB rewritten at `rate_mib_s` MiB/s (0: as fast as it goes); `mib` 0 only stops.
    ///
    /// # Errors
    /// A message when the guest has not that much memory to spare.
    pub(crate) fn set(&self, mib: u64, rate_mib_s: u64) -> Result<(), String> {
        let mut current = crate::lock(&self.current);
        if let Some((run, thread)) = current.take() {
            run.stop.store(true, Ordering::Relaxed);
            let _ = thread.join();
            self.past_mismatches
                .fetch_add(run.mismatches.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        if mib == 0 {
            return Ok(());
        }
        let spare = available_mib().saturating_sub(8);
        if mib > spare {
            return Err(format!("mib={mib} does not fit: the guest has {spare} MiB to spare"));
        }
        let run = Arc::new(Run {
            mib,
            rate_mib_s,
            ..Run::default()
        });
        let writing = Arc::clone(&run);
        let thread = std::thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(move || write(&writing));
        *current = Some((
            run,
            thread.map_err(|error| format!("cannot start the writer: {error}"))?,
        ));
        Ok(())
    }

    /// The writer as JSON.
    pub(crate) fn status(&self) -> String {
        let current = crate::lock(&self.current);
        let past = self.past_mismatches.load(Ordering::Relaxed);
        let (mib, rate, passes, pages, bad) = current.as_ref().map_or((0, 0, 0, 0, 0), |(run, _)| {
            let read = |value: &AtomicU64| value.load(Ordering::Relaxed);
            (
                run.mib,
                run.rate_mib_s,
                read(&run.passes),
                read(&run.pages_written),
                read(&run.mismatches),
            )
        });
        format!(
            "{{\"mib\":{mib},\"rate_mib_s\":{rate},\"passes\":{passes},\"written_mib\":{},\"mismatches\":{}}}",
            pages / PAGES_PER_MIB as u64,
            past + bad,
        )
    }
}

/// Rewrites the working set until it is told to stop.
fn write(run: &Run) {
    let pages = run.mib as usize * PAGES_PER_MIB;
    let mut memory = vec![0_u64; pages * PAGE_WORDS];
    let stamp = |page: usize, pass: u64| mix(((page as u64) << 32) ^ pass);
    let started = Instant::now();
    let mut written = 0_u64;
    for pass in 0.. {
        for (page, words) in memory.chunks_exact_mut(PAGE_WORDS).enumerate() {
            let old = if pass == 0 { None } else { Some(stamp(page, pass - 1)) };
            if !rewrite(words, old, stamp(page, pass)) {
                run.mismatches.fetch_add(1, Ordering::Relaxed);
            }
            written += 1;
            if page % BATCH_PAGES == 0 {
                run.pages_written.store(written, Ordering::Relaxed);
                if run.stop.load(Ordering::Relaxed) {
                    return;
                }
                pace(run, written, started);
            }
        }
        run.passes.store(pass + 1, Ordering::Relaxed);
    }
}

/// Writes one page; false when its old content (`None`: never written) was not as expected.
fn rewrite(words: &mut [u64], old: Option<u64>, new: u64) -> bool {
    let (mut expected, step) = old.map_or((0, 0), |old| (old, GOLDEN));
    let (mut value, mut difference) = (new, 0);
    for word in words {
        difference |= *word ^ expected;
        *word = value;
        expected = expected.wrapping_add(step);
        value = value.wrapping_add(GOLDEN);
    }
    difference == 0
}

/// Waits until `written` pages are due at the run's rate, in short naps so that a stop is heard.
fn pace(run: &Run, written: u64, started: Instant) {
    if run.rate_mib_s == 0 {
        return;
    }
    let due = Duration::from_micros(written * 1_000_000 / run.rate_mib_s.saturating_mul(PAGES_PER_MIB as u64));
    while let Some(left) = due.checked_sub(started.elapsed()) {
        if run.stop.load(Ordering::Relaxed) {
            return;
        }
        std::thread::sleep(left.min(Duration::from_millis(50)));
    }
}

/// `MemAvailable` in MiB, 0 when it cannot be read.
fn available_mib() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0)
        / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_changed_by_itself_is_noticed() {
        let mut page = vec![0; PAGE_WORDS];
        assert!(rewrite(&mut page, None, 7));
        assert!(rewrite(&mut page, Some(7), 8));
        page[511] ^= 1;
        assert!(!rewrite(&mut page, Some(8), 9));
        assert!(rewrite(&mut page, Some(9), 10));
        assert!(
            !rewrite(&mut page, Some(9), 10),
            "an old page, as after a lost write, is noticed too"
        );
    }
}
