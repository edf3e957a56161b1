//! One sample of one arm: boot, calm, migrate under the probe, look again, end.

use crate::arms::{Arm, Bench, Moved};
use anyhow::{Context, Result};
use e2e::probe::{Probe, now_ns};
use serde::Serialize;
use std::thread;
use std::time::Duration;

/// From the first ping until the guest is calm: its init is done then.
const CALM: Duration = Duration::from_millis(1500);
/// The window before the request in which the probe's own gaps are taken.
const BASELINE: Duration = Duration::from_secs(1);
/// How long the network is watched after the command's end.
const AFTER: Duration = Duration::from_millis(700);
/// How long a guest may take to its first ping; emulated ones take seconds.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// What one migration gave. Milliseconds unless the name says otherwise.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Sample {
    /// Longest network gap from the request on, by the 1 ms probe.
    pub blackout_ms: f64,
    /// Longest gap in the second before the request.
    pub baseline_gap_ms: f64,
    /// STOP on the source to RESUME on the destination.
    pub qemu_downtime_ms: f64,
    /// Request until the guest runs on the destination, as the arm tells.
    pub request_to_running_ms: f64,
    /// Request until the end of the longest gap, as the network tells.
    pub request_to_answer_ms: f64,
    /// Request until the command is done.
    pub total_ms: f64,
    /// Bytes sent by the source.
    pub bytes: f64,
}

impl Sample {
    /// Metrics by the names of `--json`; NaN where the arm does not tell.
    pub fn metrics(&self) -> [(&'static str, f64); 7] {
        [
            ("blackout_ms", self.blackout_ms),
            ("baseline_gap_ms", self.baseline_gap_ms),
            ("qemu_downtime_ms", self.qemu_downtime_ms),
            ("request_to_running_ms", self.request_to_running_ms),
            ("request_to_answer_ms", self.request_to_answer_ms),
            ("total_ms", self.total_ms),
            ("bytes", self.bytes),
        ]
    }
}

/// Takes one sample; the guest is ended whatever happens.
///
/// # Errors
/// When the guest does not boot or move.
pub fn sample(arm: &mut dyn Arm, bench: &Bench<'_>) -> Result<Sample> {
    let taken = boot_and_move(arm, bench);
    let ended = arm.end(bench);
    let taken = taken.with_context(|| format!("arm {}", arm.name()))?;
    ended.with_context(|| format!("arm {}: ending its guest", arm.name()))?;
    Ok(taken)
}

fn boot_and_move(arm: &mut dyn Arm, bench: &Bench<'_>) -> Result<Sample> {
    let ip = arm.boot(bench)?;
    let probe = Probe::start(&bench.lab.client_netns(), ip)?;
    probe.wait_answer(BOOT_LIMIT).context("the guest did not boot")?;
    // The calm is part of the measurement, not a wait for something.
    thread::sleep(CALM + BASELINE);
    let request = now_ns();
    let baseline = probe.longest_gap(request - BASELINE.as_nanos() as u64, request);
    let moved: Moved = arm.migrate(bench)?;
    probe
        .wait_answer(Duration::from_secs(20))
        .context("the guest does not answer after its move")?;
    thread::sleep(AFTER);
    let gap = probe.longest_gap(request, now_ns());
    Ok(Sample {
        blackout_ms: gap.ms(),
        baseline_gap_ms: baseline.ms(),
        qemu_downtime_ms: moved.qemu_downtime_ms.unwrap_or(f64::NAN),
        request_to_running_ms: moved.request_to_running_ms,
        request_to_answer_ms: gap.to_ns.saturating_sub(request) as f64 / 1e6,
        total_ms: moved.total_ms,
        bytes: moved.bytes.unwrap_or(f64::NAN),
    })
}
