//! One migration as Godwit reports it and as the world outside saw it, side by side.

use crate::cluster::Cluster;
use crate::load::Load;
use crate::probe::{Probe, now_ns};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

/// The window before the request in which the probe's own gaps are taken.
const BASELINE: Duration = Duration::from_secs(1);
/// After the command's end the network is watched for as long as a request may
/// still be lost: its limit is a second.
const AFTER: Duration = Duration::from_millis(1200);

/// What one migration cost.
#[derive(Clone, Debug, Serialize)]
pub struct Receipt {
    /// The VM's name.
    pub vm: String,
    /// Where it ran.
    pub from: String,
    /// Where it runs.
    pub to: String,
    /// Longest silence of the network from the request on, by the 1 ms probe.
    pub blackout_ms: f64,
    /// Longest silence in the second before: the probe's and the machine's own.
    pub baseline_gap_ms: f64,
    /// The guest stood still, by QEMU, whole milliseconds; `None` when it was not there any more to say so.
    pub qemu_downtime_ms: Option<f64>,
    /// Longest that the guest's own 1 ms tick was held up.
    pub guest_gap_ms: f64,
    /// From the request until the guest ran on the destination, by the controller.
    pub request_to_running_ms: f64,
    /// From starting the command to its end.
    pub command_ms: f64,
    /// HTTP requests that were due meanwhile and lost.
    pub requests_lost: u64,
    /// Bytes of guest memory sent; `None` as above.
    pub bytes: Option<u64>,
    /// Rounds of pre-copy.
    pub rounds: Vec<Round>,
    /// The stages, in order.
    pub stages: Vec<Stage>,
    /// The operation's own receipt, untouched.
    pub reported: Value,
}

/// A round as reported.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Round {
    /// Bytes sent in it.
    pub bytes: u64,
    /// Its length.
    #[serde(default)]
    pub duration_ms: f64,
}

/// A stage as reported.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stage {
    /// Its name.
    pub stage: String,
    /// Milliseconds after the request.
    pub started_ms: f64,
    /// Its length.
    pub duration_ms: f64,
}

/// The part of the operation's receipt that is read here.
#[derive(Debug, Deserialize)]
struct Reported {
    stages: Vec<Stage>,
    #[serde(default)]
    rounds: Vec<Round>,
    bytes: Option<u64>,
    qemu_downtime_ms: Option<f64>,
    request_to_running_ms: f64,
}

/// Migrates `vm` to host `to` with the command line and watches it from outside.
///
/// # Errors
/// When the command fails, reports no receipt, or the guest does not answer afterwards.
pub fn migrate(
    cluster: &Cluster,
    vm: &str,
    ip: Ipv4Addr,
    to: u8,
    probe: &Probe,
    load: Option<&Load>,
) -> Result<Receipt> {
    let netns = cluster.lab().client_netns();
    let ask = |method: &str, target: &str| crate::http::ask(&netns, ip, method, target, Duration::from_secs(5));
    let from = cluster.vm(vm)?.host.with_context(|| format!("{vm} is on no host"))?;
    ask("POST", "/gap/reset")?;
    // The calm before is part of the measurement.
    thread::sleep(BASELINE);
    let lost_before = load.map_or(0, Load::lost);
    let request = now_ns();
    let baseline = probe.longest_gap(request - BASELINE.as_nanos() as u64, request);
    let operation = cluster.json(&["vm", "migrate", vm, "--to", &format!("h{to}"), "--wait"])?;
    let command_ms = (now_ns() - request) as f64 / 1e6;
    probe
        .wait_answer(Duration::from_secs(20))
        .with_context(|| format!("{vm} does not answer after its move to h{to}"))?;
    thread::sleep(AFTER);
    let gap = probe.longest_gap(request, now_ns());
    let status: Value = serde_json::from_str(&ask("GET", "/status")?).context("the guest's status is not JSON")?;
    let reported = reported(&operation)?;
    let read: Reported = serde_json::from_value(reported.clone()).context("the operation's receipt lacks something")?;
    if !cluster.vm(vm)?.runs_on(to) {
        bail!("the migration of {vm} succeeded, but it is not active on h{to}");
    }
    Ok(Receipt {
        vm: vm.to_owned(),
        from,
        to: format!("h{to}"),
        blackout_ms: gap.ms(),
        baseline_gap_ms: baseline.ms(),
        qemu_downtime_ms: read.qemu_downtime_ms,
        guest_gap_ms: status["largest_gap_us"].as_f64().unwrap_or(f64::NAN) / 1e3,
        request_to_running_ms: read.request_to_running_ms,
        command_ms,
        requests_lost: load.map_or(0, Load::lost) - lost_before,
        bytes: read.bytes,
        rounds: read.rounds,
        stages: read.stages,
        reported,
    })
}

/// The receipt in an operation as `vm migrate --wait -o json` prints it.
///
/// # Errors
/// When there is none.
pub fn reported(operation: &Value) -> Result<Value> {
    let places = [&operation["receipt"], &operation["kind"]["receipt"]];
    let found = places.into_iter().find(|receipt| receipt.is_object());
    found
        .cloned()
        .with_context(|| format!("the migration reports no receipt: {operation}"))
}

impl Receipt {
    /// The receipt for people: stages, then what it cost, a line each.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("  {:<24}{:>12}{:>12}", "stage", "started", "took")];
        for stage in &self.stages {
            let (started, took) = (whole_ms(stage.started_ms), whole_ms(stage.duration_ms));
            lines.push(format!("  {:<24}{started:>12}{took:>12}", stage.stage));
        }
        let rounds: Vec<String> = self.rounds.iter().take(6).map(|round| mib(round.bytes)).collect();
        let more = if self.rounds.len() > 6 { ", ..." } else { "" };
        let copied = match self.rounds.len() {
            0 => String::new(),
            1 => "in 1 round".to_owned(),
            n => format!("in {n} rounds: {}{more}", rounds.join(", ")),
        };
        let mut fact = |what: &str, value: String, note: String| {
            lines.push(format!("  {what:<24}{value:>12}  {note}").trim_end().to_owned());
        };
        let sent = self.bytes.map_or_else(unknown, mib);
        fact("memory sent", sent, copied);
        let running = whole_ms(self.request_to_running_ms);
        fact(&format!("running on {}", self.to), running, "after the request".into());
        let stood = self.qemu_downtime_ms.map_or_else(unknown, whole_ms);
        fact("guest stood still", stood, "by QEMU".into());
        let note = format!(
            "longest between answers to a 1 ms ping ({} while calm)",
            ms(self.baseline_gap_ms)
        );
        fact("network silent", ms(self.blackout_ms), note);
        fact(
            "requests lost",
            self.requests_lost.to_string(),
            "of 100 a second, 1 s each, never repeated".into(),
        );
        lines
    }
}

/// What the probe measured, to its grain.
fn ms(value: f64) -> String {
    format!("{value:.1} ms")
}

/// What Godwit and QEMU tell, in whole milliseconds.
fn whole_ms(value: f64) -> String {
    format!("{value:.0} ms")
}

fn unknown() -> String {
    "unknown".into()
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_nobody_was_there_to_say_is_unknown_and_no_error() {
        let told = json!({ "stages": [], "request_to_running_ms": 12 });
        let read: Reported = serde_json::from_value(told).unwrap();
        assert_eq!((read.bytes, read.qemu_downtime_ms), (None, None));
    }

    #[test]
    fn a_receipt_is_found_at_the_top_or_in_the_kind_and_its_absence_is_an_error() {
        let receipt = json!({ "bytes": 1 });
        assert_eq!(reported(&json!({ "receipt": receipt })).unwrap(), receipt);
        assert_eq!(
            reported(&json!({ "kind": { "kind": "migrate-vm", "receipt": receipt } })).unwrap(),
            receipt
        );
        assert!(reported(&json!({ "kind": { "kind": "migrate-vm" } })).is_err());
    }
}
