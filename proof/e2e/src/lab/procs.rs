//! A lab's processes: found by namespace or by their mark, killed by pidfd.

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Environment variable that every process of a lab carries; its value is the
/// lab's directory.
pub(crate) const MARK: &str = "GODWIT_LAB";

/// How long a killed process may take to be gone.
const DEATH_LIMIT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// What makes a process belong here: any of these.
#[derive(Debug, Default)]
pub(crate) struct Belongs {
    /// Inodes of network namespaces.
    pub(crate) net: BTreeSet<u64>,
    /// Inodes of mount namespaces.
    pub(crate) mount: BTreeSet<u64>,
    /// `NAME=value` in the environment it was started with.
    pub(crate) mark: Option<String>,
}

impl Belongs {
    fn has(&self, proc: &Path) -> bool {
        namespace_inode(&proc.join("ns/net")).is_some_and(|inode| self.net.contains(&inode))
            || namespace_inode(&proc.join("ns/mnt")).is_some_and(|inode| self.mount.contains(&inode))
            || self.mark.as_ref().is_some_and(|mark| {
                fs::read(proc.join("environ")).is_ok_and(|environment| {
                    environment
                        .split(|byte| *byte == 0)
                        .any(|entry| entry == mark.as_bytes())
                })
            })
    }

    /// Ids of the living processes that belong, ourselves never among them.
    pub(crate) fn processes(&self) -> Result<Vec<u32>> {
        let own = std::process::id();
        let entries = fs::read_dir("/proc").context("cannot list /proc")?;
        Ok(entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
                (pid != own && self.has(&entry.path())).then_some(pid)
            })
            .collect())
    }

    /// Kills all that belong, but `spare`, and waits until they are gone;
    /// what they forked meanwhile too.
    ///
    /// # Errors
    /// When something does not die, or is born faster than it is killed.
    pub(crate) fn kill(&self, spare: Option<u32>) -> Result<()> {
        for _ in 0..64 {
            let mut found = self.processes()?;
            found.retain(|pid| Some(*pid) != spare);
            if found.is_empty() {
                return Ok(());
            }
            kill_all(&found, |pid| self.has(&Path::new("/proc").join(pid.to_string())))?;
        }
        bail!("processes of the lab are started faster than they can be killed")
    }
}

/// Inode of the namespace behind a `/proc/PID/ns/*` link or a bound namespace file.
pub(crate) fn namespace_inode(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|meta| meta.ino())
}

/// SIGKILL to each by pidfd, then waits for all ends. `still` is asked once the
/// pidfd is held, so that a reused id is never hit.
fn kill_all(pids: &[u32], still: impl Fn(u32) -> bool) -> Result<()> {
    let mut held = Vec::new();
    for &id in pids {
        let Some(pid) = i32::try_from(id).ok().and_then(Pid::from_raw) else {
            continue;
        };
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
            continue;
        };
        if still(id) && pidfd_send_signal(&pidfd, Signal::KILL).is_ok() {
            held.push((id, pidfd));
        }
    }
    for (id, pidfd) in held {
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        if poll(&mut fds, Some(&DEATH_LIMIT)).context("cannot wait for a killed process")? == 0 {
            bail!("process {id} of the lab does not die");
        }
    }
    Ok(())
}

/// Kills one process that we know by id and waits for its end.
///
/// # Errors
/// When it does not die within 10 s.
pub fn kill_process(pid: u32) -> Result<()> {
    kill_all(&[pid], |_| true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_marked_process_is_found_and_killed_and_no_other() {
        let mark = format!("{MARK}=/test/{}", std::process::id());
        let mut marked = Command::new("sleep")
            .arg("60")
            .env(MARK, &mark[MARK.len() + 1..])
            .spawn()
            .unwrap();
        let mut other = Command::new("sleep").arg("60").spawn().unwrap();
        let belongs = Belongs {
            mark: Some(mark),
            ..Belongs::default()
        };
        assert_eq!(belongs.processes().unwrap(), vec![marked.id()]);
        belongs.kill(None).unwrap();
        assert!(!marked.wait().unwrap().success());
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
