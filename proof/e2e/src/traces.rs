//! What a VM has left on a host: processes, taps, files. For telling that nothing leaked, and for hitting one process.

use crate::lab::{Lab, Place};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// What a VM has on one host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traces {
    /// Its QEMUs.
    pub qemu: Vec<u32>,
    /// Its tunnels.
    pub tunnels: Vec<u32>,
    /// Whether it has a directory of sockets.
    pub run_dir: bool,
    /// Its taps, of those whose names were given.
    pub taps: BTreeSet<String>,
}

impl Traces {
    /// Looks for VM `id` on host `n`.
    ///
    /// # Errors
    /// When /proc or the host's links cannot be read.
    pub fn of(lab: &Lab, n: u8, id: &str) -> Result<Traces> {
        let host = lab.host(n)?;
        let mut traces = Traces {
            run_dir: host.dir().join("run").join(id).exists(),
            taps: taps(lab, n)?,
            ..Traces::default()
        };
        for pid in host.processes()? {
            match kind(pid, id) {
                Some(Kind::Qemu) => traces.qemu.push(pid),
                Some(Kind::Tunnel) => traces.tunnels.push(pid),
                None => {}
            }
        }
        Ok(traces)
    }

    /// Whether nothing of it is there.
    pub fn is_empty(&self) -> bool {
        *self == Traces::default()
    }

    /// Whether it is what a VM that runs in peace has: one QEMU with one tap, and its directory.
    pub fn is_settled(&self) -> bool {
        self.qemu.len() == 1 && self.tunnels.is_empty() && self.run_dir && self.taps.len() == 1
    }
}

impl fmt::Display for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "QEMU {:?}, tunnels {:?}, directory {}, taps {:?}",
            self.qemu, self.tunnels, self.run_dir, self.taps
        )
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Qemu,
    Tunnel,
}

/// What process `pid` is to VM `id`.
fn kind(pid: u32, id: &str) -> Option<Kind> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words: Vec<_> = bytes
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word))
        .collect();
    kind_of(&words, id)
}

fn kind_of<S: AsRef<str>>(words: &[S], id: &str) -> Option<Kind> {
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
    if words.windows(2).any(|pair| pair == ["-uuid", id]) {
        return Some(Kind::Qemu);
    }
    let is_tunnel = words.get(1) == Some(&"tunnel") && words.iter().any(|word| word.contains(id));
    is_tunnel.then_some(Kind::Tunnel)
}

/// The names of Godwit's taps on host `n`.
fn taps(lab: &Lab, n: u8) -> Result<BTreeSet<String>> {
    let json = lab.run(Place::Host(n), &["ip", "-j", "-d", "link"])?;
    let links: Value = serde_json::from_str(&json).context("cannot read `ip -j link`")?;
    let taps = links
        .as_array()
        .into_iter()
        .flatten()
        .filter(|link| link["linkinfo"]["info_kind"] == "tun");
    Ok(taps
        .filter_map(|link| link["ifname"].as_str().map(str::to_owned))
        .collect())
}

/// Waits until VM `id`, the only one of the lab that is on, runs on host `n` in peace and nothing of it is anywhere else.
///
/// # Errors
/// When that is not so within `limit`; says what is where.
pub fn settled(lab: &Lab, id: &str, n: u8, limit: Duration) -> Result<u32> {
    until(lab, id, limit, |host, traces| {
        if host == n {
            traces.is_settled()
        } else {
            traces.is_empty()
        }
    })?;
    let traces = Traces::of(lab, n, id)?;
    traces.qemu.first().copied().context("the QEMU ended just now")
}

/// Waits until nothing of VM `id` is on any host.
///
/// # Errors
/// When that is not so within `limit`; says what is where.
pub fn gone(lab: &Lab, id: &str, limit: Duration) -> Result<()> {
    until(lab, id, limit, |_, traces| traces.is_empty())
}

fn until(lab: &Lab, id: &str, limit: Duration, wanted: impl Fn(u8, &Traces) -> bool) -> Result<()> {
    let end = Instant::now() + limit;
    loop {
        let mut wrong = Vec::new();
        for host in lab.hosts() {
            let traces = Traces::of(lab, host.number(), id)?;
            if !wanted(host.number(), &traces) {
                wrong.push(format!("{}: {traces}", host.name()));
            }
        }
        if wrong.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("of VM {id} after {} s: {}", limit.as_secs(), wrong.join("; "));
        }
        // Processes of others end without telling us.
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Files of volumes in a pool's directory.
///
/// # Errors
/// When it cannot be read.
pub fn volumes(pool: &Path) -> Result<BTreeSet<String>> {
    let dir = pool.join("volumes");
    if !dir.exists() {
        return Ok(BTreeSet::new());
    }
    let entries = fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let names = entries.map(|entry| {
        Ok(entry
            .context("cannot list a pool")?
            .file_name()
            .to_string_lossy()
            .into_owned())
    });
    names.collect()
}

/// That no process of the lab panicked, by its log.
///
/// # Errors
/// The line that says so, and where.
pub fn no_panic(lab: &Lab) -> Result<()> {
    let entries = fs::read_dir(lab.logs()).context("cannot list the logs")?;
    for entry in entries {
        let path = entry.context("cannot list the logs")?.path();
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let text = String::from_utf8_lossy(&text);
        let line = text.lines().find(|line| line.contains("panicked"));
        ensure!(line.is_none(), "{}: {}", path.display(), line.unwrap_or_default());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_and_a_tunnel_are_told_from_others() {
        let id = "0197b2a0-0000-7000-8000-000000000000";
        assert_eq!(kind_of(&["qemu", "-uuid", id], id), Some(Kind::Qemu));
        assert_eq!(kind_of(&["qemu", "-uuid", "other"], id), None);
        let spec = format!("/run/godwit/{id}/tunnel/spec.json");
        assert_eq!(kind_of(&["godwit", "tunnel", "--spec", &spec], id), Some(Kind::Tunnel));
        assert_eq!(kind_of(&["grep", id], id), None);
    }
}
