//! Arm `qemu-tuned`: QEMU driven by hand as fast as it goes, over a raw TCP socket.

use super::qemu::{B, Qemu, Running, destination_uri, wall_ms};
use super::{Arm, Bench, Moved};
use anyhow::Result;
use serde_json::{Value, json};
use std::net::Ipv4Addr;

/// See the file's first line.
#[derive(Debug, Default)]
pub struct QemuTuned {
    running: Running,
}

/// On the source: no bandwidth limit, a downtime budget that makes it converge
/// as far as it can; the destination announces itself at once.
pub(super) fn tuned() -> Value {
    json!({
        "max-bandwidth": 100_u64 << 30,
        "downtime-limit": 10,
        "announce-initial": 1,
        "announce-max": 10,
        "announce-rounds": 5,
        "announce-step": 3,
    })
}

impl Arm for QemuTuned {
    fn name(&self) -> &'static str {
        "qemu-tuned"
    }

    fn boot(&mut self, bench: &Bench<'_>) -> Result<Ipv4Addr> {
        self.running = Running::boot(bench, &[])?;
        Ok(bench.guest.ip)
    }

    fn migrate(&mut self, bench: &Bench<'_>) -> Result<Moved> {
        let started_ms = wall_ms();
        let uri = destination_uri(bench.lab)?;
        let incoming = ["-incoming".to_owned(), "defer".to_owned()];
        let mut destination = Qemu::spawn(bench, B, &self.running.disk, &incoming)?;
        destination.set_capabilities(&["return-path"])?;
        destination.set_parameters(tuned())?;
        destination.qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
        if let Some(source) = &mut self.running.source {
            source.set_capabilities(&["events", "return-path"])?;
            source.set_parameters(tuned())?;
            source.qmp.execute("migrate", json!({ "uri": uri }))?;
        }
        self.running.finish(destination, started_ms)
    }

    fn end(&mut self, _bench: &Bench<'_>) -> Result<()> {
        self.running.end()
    }
}
