//! Arm `qemu-default`: QEMU as it comes, with its 128 MiB/s limit and 300 ms budget, unencrypted.

use super::qemu::{B, Qemu, Running, destination_uri, wall_ms};
use super::{Arm, Bench, Moved};
use anyhow::Result;
use serde_json::json;
use std::net::Ipv4Addr;

/// See the file's first line.
#[derive(Debug, Default)]
pub struct QemuDefault {
    running: Running,
}

impl Arm for QemuDefault {
    fn name(&self) -> &'static str {
        "qemu-default"
    }

    fn boot(&mut self, bench: &Bench<'_>) -> Result<Ipv4Addr> {
        self.running = Running::boot(bench, &[])?;
        Ok(bench.guest.ip)
    }

    fn migrate(&mut self, bench: &Bench<'_>) -> Result<Moved> {
        let started_ms = wall_ms();
        let uri = destination_uri(bench.lab)?;
        let incoming = ["-incoming".to_owned(), uri.clone()];
        let destination = Qemu::spawn(bench, B, &self.running.disk, &incoming)?;
        if let Some(source) = &mut self.running.source {
            // Tells, and changes nothing.
            source.set_capabilities(&["events"])?;
            source.qmp.execute("migrate", json!({ "uri": uri }))?;
        }
        self.running.finish(destination, started_ms)
    }

    fn end(&mut self, _bench: &Bench<'_>) -> Result<()> {
        self.running.end()
    }
}
