//! What the bare QEMU arms share: bridge and tap, spawn, the two ends' times.

use super::{Bench, Moved};
use crate::guest::{BRIDGE, TAP};
use crate::qmp::Qmp;
use anyhow::{Context, Result};
use e2e::lab::{Lab, Place, Proc};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The first host of the bare arms.
pub(super) const A: u8 = 1;
/// The second.
pub(super) const B: u8 = 2;
/// Where the destination listens.
pub(super) const PORT: u16 = 49_152;

/// A QEMU and our connection to it.
#[derive(Debug)]
pub(super) struct Qemu {
    pub(super) process: Proc,
    pub(super) qmp: Qmp,
}

impl Qemu {
    /// Starts the guest's QEMU on host `n` and waits for its greeting.
    pub(super) fn spawn(bench: &Bench<'_>, n: u8, disk: &Path, extra: &[String]) -> Result<Qemu> {
        let socket = bench.lab.host(n)?.dir().join("run/bench-qmp.sock");
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).context("cannot listen for QEMU")?;
        let argv = bench.guest.argv(disk, Path::new("/run/godwit/bench-qmp.sock"), extra);
        let process = bench.lab.spawn(Place::Host(n), &format!("bench-qemu-h{n}"), &argv)?;
        let qmp = Qmp::accept(&listener).with_context(|| format!("see {}", process.log().display()))?;
        Ok(Qemu { process, qmp })
    }

    pub(super) fn set_capabilities(&mut self, names: &[&str]) -> Result<()> {
        let list: Vec<Value> = names
            .iter()
            .map(|name| json!({ "capability": name, "state": true }))
            .collect();
        self.qmp
            .execute("migrate-set-capabilities", json!({ "capabilities": list }))
            .map(drop)
    }

    pub(super) fn set_parameters(&mut self, parameters: Value) -> Result<()> {
        self.qmp.execute("migrate-set-parameters", parameters).map(drop)
    }
}

/// Bridge and tap on both hosts, once.
pub(super) fn prepare_network(lab: &Lab) -> Result<()> {
    for n in [A, B] {
        let links = lab.run(Place::Host(n), &["ip", "-o", "link"])?;
        if links.contains(BRIDGE) {
            continue;
        }
        let script = [
            &[
                "link",
                "add",
                BRIDGE,
                "type",
                "bridge",
                "forward_delay",
                "0",
                "stp_state",
                "0",
            ][..],
            &["link", "set", "vm0", "master", BRIDGE],
            &["link", "set", BRIDGE, "up"],
            &["tuntap", "add", "dev", TAP, "mode", "tap"],
            &["link", "set", TAP, "master", BRIDGE],
            &["link", "set", TAP, "up"],
        ];
        for arguments in script {
            let mut argv = vec!["ip"];
            argv.extend(arguments);
            lab.run(Place::Host(n), &argv)?;
        }
    }
    Ok(())
}

/// The guest of a bare arm: its disk, and where it runs now.
#[derive(Debug, Default)]
pub(super) struct Running {
    pub(super) disk: PathBuf,
    pub(super) source: Option<Qemu>,
    pub(super) destination: Option<Qemu>,
}

impl Running {
    pub(super) fn boot(bench: &Bench<'_>, extra: &[String]) -> Result<Running> {
        prepare_network(bench.lab)?;
        let disk = bench.guest.fresh_disk(bench.lab)?;
        let source = Qemu::spawn(bench, A, &disk, extra)?;
        Ok(Running {
            disk,
            source: Some(source),
            destination: None,
        })
    }

    /// From `migrate` to the end on both sides. `started_ms` is the request's time.
    pub(super) fn finish(&mut self, mut destination: Qemu, started_ms: f64) -> Result<Moved> {
        let mut source = self.source.take().context("the guest is not running")?;
        let stopped = source.qmp.wait("STOP", |_| true)?;
        let resumed = destination.qmp.wait("RESUME", |_| true)?;
        source.qmp.wait_completed()?;
        let state = source.qmp.execute("query-migrate", json!({}))?;
        let total_ms = wall_ms() - started_ms;
        source.qmp.execute("quit", json!({}))?;
        source.process.wait()?;
        self.destination = Some(destination);
        Ok(Moved {
            request_to_running_ms: resumed - started_ms,
            total_ms,
            qemu_downtime_ms: Some(resumed - stopped),
            bytes: state["ram"]["transferred"].as_f64(),
        })
    }

    pub(super) fn end(&mut self) -> Result<()> {
        for mut qemu in [self.source.take(), self.destination.take()].into_iter().flatten() {
            qemu.process.kill()?;
        }
        Ok(())
    }
}

/// The wall clock, as QMP's timestamps: both ends are on this machine.
pub(super) fn wall_ms() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_secs_f64() * 1e3
}

/// Where the source dials.
pub(super) fn destination_uri(lab: &Lab) -> Result<String> {
    Ok(format!("tcp:{}:{PORT}", lab.host(B)?.address()))
}
