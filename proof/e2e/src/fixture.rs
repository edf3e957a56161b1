//! What the tests of the whole share: a cluster of three hosts with the micro template, and the guest's own words.

use crate::cluster::{Cluster, Ended, Vm};
use crate::suite;
use crate::traces;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Hosts of the cluster.
pub const HOSTS: u8 = 3;
/// Names the QEMU of the hosts; without it, the one in PATH.
const QEMU: &str = "GODWIT_QEMU";
/// Memory of a VM of these tests, MiB: enough for the guest and its memory writer.
pub const MEMORY: &str = "256M";
/// A guest that does not answer after this did not start.
pub const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// What is left behind goes away within this.
pub const SETTLE_LIMIT: Duration = Duration::from_secs(20);

/// A running cluster with the template `micro`. After each test its VMs are deleted, and nothing may be left of them.
#[derive(Debug)]
pub struct Shared {
    /// The cluster.
    pub cluster: Cluster,
}

impl suite::Fixture for Shared {
    fn set_up() -> Result<Self> {
        let godwit = std::env::var_os("GODWIT_BIN").map(PathBuf::from);
        let godwit = godwit.context("GODWIT_BIN does not name the program; run `cargo xtask test --only e2e`")?;
        let qemu = std::env::var_os(QEMU).map(PathBuf::from);
        let shared = Shared {
            cluster: Cluster::started(&godwit, HOSTS, qemu.as_deref())?,
        };
        match shared.build_template(&godwit) {
            Ok(()) => Ok(shared),
            Err(error) => {
                let kept = shared.keep().map(|dir| format!("logs: {}", dir.display()));
                Err(error.context(kept.unwrap_or_default()))
            }
        }
    }

    fn after_each(&mut self) -> Result<()> {
        let revived = self.revive();
        let cleared = self.clear();
        traces::no_panic(self.cluster.lab())?;
        revived.and(cleared)
    }

    fn keep(&self) -> Option<PathBuf> {
        self.cluster.lab().keep_logs()
    }
}

impl Shared {
    /// Builds the micro template. What it is made of is kept beside the program, for the next cluster.
    fn build_template(&self, godwit: &Path) -> Result<()> {
        let target = godwit.canonicalize().context("no such program")?;
        let target = target
            .ancestors()
            .nth(2)
            .context("the program is not in a target directory")?;
        let mut build = self.cluster.command(&["template", "build", "micro", "--wait"]);
        let built = Ended::of(build.env("XDG_CACHE_HOME", target.join("e2e-cache")))?;
        ensure!(
            built.code == Some(0),
            "the micro template is not built: {}",
            built.err.trim()
        );
        Ok(())
    }

    /// A micro VM that runs on host `n` and answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn create(&self, name: &str, n: u8) -> Result<Guest> {
        self.create_with(name, n, &[])
    }

    /// The same, with further options of `vm create`.
    ///
    /// # Errors
    /// When it does not.
    pub fn create_with(&self, name: &str, n: u8, more: &[&str]) -> Result<Guest> {
        let host = format!("h{n}");
        let words = [
            "vm",
            "create",
            name,
            "--template",
            "micro",
            "--memory",
            MEMORY,
            "--host",
            &host,
            "--wait",
        ];
        self.cluster.json(&[&words, more].concat())?;
        self.guest(name)
    }

    /// A VM that runs, once it answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn guest(&self, name: &str) -> Result<Guest> {
        let vm = self.cluster.wait_vm(name, BOOT_LIMIT, |vm| vm.state == "active")?;
        self.cluster.wait_http(vm.ip, BOOT_LIMIT)?;
        Ok(Guest {
            id: id_of(&vm)?,
            name: name.to_owned(),
            ip: vm.ip,
            netns: self.cluster.lab().client_netns(),
        })
    }

    /// Whether guests stand while they are copied, by the facts of the hosts: emulated ones of a QEMU before 10 (ADR 0022). Requests
    /// that were due meanwhile are answered late then, or not at all.
    ///
    /// # Errors
    /// When the hosts do not tell.
    pub fn stands_while_copied(&self) -> Result<bool> {
        let host = self.cluster.json(&["host", "show", "h1"])?;
        let hypervisor = &host["status"]["facts"]["hypervisor"];
        let version = hypervisor["version"].as_str().unwrap_or_default();
        let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok());
        let major = major.with_context(|| format!("h1 tells no version of its QEMU: {hypervisor}"))?;
        Ok(hypervisor["accelerator"] == "tcg" && major < 10)
    }

    /// An operation, once it is over.
    ///
    /// # Errors
    /// When it is not within `seconds`.
    pub fn ended(&self, operation: &str, seconds: u32) -> Result<Value> {
        let seconds = seconds.to_string();
        let ended = self
            .cluster
            .attempt(&["op", "wait", operation, "--timeout", &seconds, "-o", "json"])?;
        ensure!(
            ended.code != Some(6),
            "operation {operation} did not end within {seconds} s"
        );
        self.cluster.json(&["op", "show", operation])
    }

    /// Waits until VM `guest` runs on host `n` in peace, and nothing of it is elsewhere; returns its QEMU.
    ///
    /// # Errors
    /// When that is not so soon.
    pub fn settled(&self, guest: &Guest, n: u8) -> Result<u32> {
        let vm = self.cluster.wait_vm(&guest.name, SETTLE_LIMIT, |vm| vm.runs_on(n))?;
        ensure!(
            vm.json["operation"].is_null(),
            "{} is still held by an operation",
            guest.name
        );
        traces::settled(self.cluster.lab(), &guest.id, n, SETTLE_LIMIT)
    }

    /// Starts what a test killed and did not start again, and says so when it should not be dead.
    fn revive(&mut self) -> Result<()> {
        let mut dead = Vec::new();
        if let Err(error) = self.cluster.controller_pid() {
            dead.push(format!("{error:#}"));
            self.cluster.start_controller()?;
        }
        for n in 1..=HOSTS {
            self.cluster.lab().host(n)?.shape(None)?;
            if let Err(error) = self.cluster.agent_pid(n) {
                dead.push(format!("{error:#}"));
                self.cluster.start_agent(n)?;
            }
        }
        ensure!(dead.is_empty(), "after the test: {}", dead.join("; "));
        Ok(())
    }

    /// Deletes all VMs and looks for what they left.
    fn clear(&self) -> Result<()> {
        let lab = self.cluster.lab();
        let vms = self.cluster.json(&["vm", "list"])?;
        let mut ids = Vec::new();
        for vm in vms.as_array().into_iter().flatten() {
            let name = vm["name"].as_str().context("a VM without a name")?;
            self.delete(name, vm["operation"].as_str())
                .with_context(|| format!("clearing away {name}"))?;
            ids.push(vm["id"].as_str().context("a VM without an id")?);
        }
        ids.iter().try_for_each(|id| traces::gone(lab, id, SETTLE_LIMIT))?;
        let mut pools = vec![lab.shared()];
        pools.extend(lab.hosts().iter().map(|host| host.dir().join("local")));
        for pool in pools {
            let left = traces::volumes(&pool)?;
            ensure!(
                left.is_empty(),
                "volumes of deleted VMs in {}: {left:?}",
                pool.display()
            );
        }
        Ok(())
    }

    fn delete(&self, name: &str, held: Option<&str>) -> Result<()> {
        if let Some(operation) = held {
            // It may end by itself just now.
            let _ = self.cluster.attempt(&["op", "cancel", operation]);
            self.ended(operation, 60)?;
        }
        self.cluster
            .cli(&["vm", "delete", name, "--wait", "--timeout", "60"])
            .map(drop)
    }
}

fn id_of(vm: &Vm) -> Result<String> {
    vm.json["id"].as_str().map(str::to_owned).context("the VM has no id")
}

/// A micro guest: what it says of itself, asked from the client's place.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The VM's id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its address.
    pub ip: Ipv4Addr,
    netns: PathBuf,
}

impl Guest {
    /// Asks the guest; its answer's JSON.
    ///
    /// # Errors
    /// When it does not answer within 20 s, or not with 2xx.
    pub fn ask(&self, method: &str, target: &str) -> Result<Value> {
        let body = crate::http::ask(&self.netns, self.ip, method, target, Duration::from_secs(20))?;
        Ok(serde_json::from_str(&body).unwrap_or(Value::Null))
    }

    /// `GET /status`.
    ///
    /// # Errors
    /// As [`Guest::ask`].
    pub fn status(&self) -> Result<Status> {
        self.status_within(Duration::from_secs(20))
    }

    /// `GET /status`, answered within `limit`.
    ///
    /// # Errors
    /// As [`Guest::ask`].
    pub fn status_within(&self, limit: Duration) -> Result<Status> {
        let body = crate::http::ask(&self.netns, self.ip, "GET", "/status", limit)?;
        let json: Value = serde_json::from_str(&body).context("the guest's status is not JSON")?;
        let number = |value: &Value| {
            value
                .as_u64()
                .with_context(|| format!("the guest's status lacks something: {json}"))
        };
        Ok(Status {
            counter: number(&json["counter"])?,
            ticks: number(&json["ticks"])?,
            uptime_ms: number(&json["uptime_ms"])?,
            mismatches: number(&json["memory_writer"]["mismatches"])?,
            written_mib: number(&json["memory_writer"]["written_mib"])?,
        })
    }

    /// Rewrites `mib` MiB of the guest's memory at `rate_mib_s`, checking each page first; 0 MiB stops that.
    ///
    /// # Errors
    /// As [`Guest::ask`].
    pub fn write_memory(&self, mib: u32, rate_mib_s: u32) -> Result<()> {
        self.ask("POST", &format!("/memory?mib={mib}&rate_mib_s={rate_mib_s}"))
            .map(drop)
    }

    /// Writes its disk with the stream of a seed; returns the checksum.
    ///
    /// # Errors
    /// As [`Guest::ask`].
    pub fn write_disk(&self, mib: u32, seed: u32) -> Result<String> {
        let said = self.ask("POST", &format!("/disk/write?mib={mib}&seed={seed}"))?;
        said["checksum"]
            .as_str()
            .map(str::to_owned)
            .with_context(|| format!("no checksum: {said}"))
    }

    /// Reads its disk back past all caches; returns the checksum.
    ///
    /// # Errors
    /// When a byte is not what was written.
    pub fn check_disk(&self) -> Result<String> {
        let said = self.ask("GET", "/disk/check")?;
        ensure!(said["ok"] == true, "the guest's disk is wrong: {said}");
        said["checksum"]
            .as_str()
            .map(str::to_owned)
            .with_context(|| format!("no checksum: {said}"))
    }
}

/// What a guest says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// One for each answer it ever gave.
    pub counter: u64,
    /// Milliseconds that it counted itself.
    pub ticks: u64,
    /// Milliseconds by its clock since it started.
    pub uptime_ms: u64,
    /// Pages that did not hold what was written.
    pub mismatches: u64,
    /// MiB that its memory writer has written.
    pub written_mib: u64,
}

impl Status {
    /// Whether this is the same guest, later: its memory has not been lost or gone back.
    ///
    /// # Errors
    /// What contradicts that.
    pub fn follows(&self, before: &Status) -> Result<()> {
        ensure!(
            self.counter > before.counter,
            "the guest's counter fell from {} to {}",
            before.counter,
            self.counter
        );
        ensure!(
            self.ticks > before.ticks,
            "the guest's ticks fell from {} to {}",
            before.ticks,
            self.ticks
        );
        ensure!(
            self.mismatches == 0,
            "{} pages of the guest's memory are wrong",
            self.mismatches
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_rebooted_or_lost_a_page_is_not_the_same_one_later() {
        let status = |counter, ticks, mismatches| Status {
            counter,
            ticks,
            uptime_ms: ticks,
            mismatches,
            written_mib: 0,
        };
        assert!(status(9, 900, 0).follows(&status(8, 800, 0)).is_ok());
        assert!(status(1, 900, 0).follows(&status(8, 800, 0)).is_err());
        assert!(status(9, 10, 0).follows(&status(8, 800, 0)).is_err());
        assert!(status(9, 900, 1).follows(&status(8, 800, 0)).is_err());
    }
}
