//! Arm `godwit`: `godwit vm migrate`, encrypted as always, between an agent each on
//! two hosts of the same lab.

use super::{Arm, Bench, Moved};
use crate::guest::MEMORY_MIB;
use anyhow::{Context, Result};
use e2e::cluster::Cluster;
use e2e::receipt::reported;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// The bare arms have the first two hosts: a host's uplink is in one bridge only.
const A: u8 = 3;
const B: u8 = 4;
const VM: &str = "bench";

/// See the file's first lines.
#[derive(Debug)]
pub struct Godwit {
    cluster: Cluster,
    ready: bool,
}

impl Godwit {
    /// The arm over a cluster whose controller is not started yet.
    pub fn new(cluster: Cluster) -> Godwit {
        Godwit { cluster, ready: false }
    }

    fn prepare(&mut self) -> Result<()> {
        if self.ready {
            return Ok(());
        }
        self.cluster.start_controller()?;
        for n in [A, B] {
            self.cluster.join(n)?;
        }
        self.cluster.cli(&["template", "build", "micro"])?;
        self.ready = true;
        Ok(())
    }
}

impl Arm for Godwit {
    fn name(&self) -> &'static str {
        "godwit"
    }

    fn boot(&mut self, _bench: &Bench<'_>) -> Result<Ipv4Addr> {
        self.prepare()?;
        let (memory, host) = (format!("{MEMORY_MIB}M"), format!("h{A}"));
        let size = ["--memory", &memory, "--vcpus", "1", "--host", &host, "--wait"];
        let mut create = vec!["vm", "create", VM, "--template", "micro"];
        create.extend(size);
        self.cluster.json(&create)?;
        Ok(self
            .cluster
            .wait_vm(VM, Duration::from_secs(30), |vm| vm.runs_on(A))?
            .ip)
    }

    fn migrate(&mut self, _bench: &Bench<'_>) -> Result<Moved> {
        let started = Instant::now();
        let operation = self
            .cluster
            .json(&["vm", "migrate", VM, "--to", &format!("h{B}"), "--wait"])?;
        let total_ms = started.elapsed().as_secs_f64() * 1e3;
        let receipt = reported(&operation)?;
        let figure = |name: &str| receipt[name].as_f64();
        Ok(Moved {
            // From the API's request, as the bare arms count from ours. What the
            // command line adds shows in total_ms and in request_to_answer_ms.
            request_to_running_ms: figure("request_to_running_ms")
                .context("the receipt has no request_to_running_ms")?,
            total_ms,
            // Both hosts are this machine: one clock, the same two events as the bare arms.
            qemu_downtime_ms: figure("stop_to_resume_ms").or(figure("qemu_downtime_ms")),
            bytes: figure("bytes"),
        })
    }

    fn end(&mut self, _bench: &Bench<'_>) -> Result<()> {
        let known = self.cluster.cli(&["vm", "show", VM]).is_ok();
        if known {
            self.cluster.cli(&["vm", "delete", VM, "--wait"])?;
        }
        Ok(())
    }
}
