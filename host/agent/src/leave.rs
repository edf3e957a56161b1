//! A host that was removed from its cell: how it learns that, and what must be over before it may join anew.
//!
//! ```text
//!   removed ──▶ nothing of it runs? ──▶ a fresh token is taken ──▶ journal, logs, sockets go ──▶ joined, under a new id
//!                     └─ something does: refused, and named
//! ```
//!
//! A person who removes a host may start its VMs elsewhere. So its agent takes up none of them again, and a new membership begins
//! with an empty journal, only when no process of the former one is left: a guest never runs twice because its host came back.

use std::{fs, io, path::PathBuf};

use model::{HostId, Refusal, VmId};

use crate::{
    config::{AgentConfig, Membership, StateError},
    facts,
    journal::{Journal, JournalError},
    session::{self, SessionError},
};

/// What the controller says of this host's membership.
#[derive(Debug)]
pub enum Standing {
    /// The host is of the cell, or nobody could be asked: then what it knows of itself stands.
    Member,
    /// It was removed. The controller was who it should be, by its certificate.
    Removed(Refusal),
}

/// Why a former membership cannot be given up.
#[derive(Debug, thiserror::Error)]
pub enum LeaveError {
    /// It still runs something, that another host may run as well by now.
    #[error(
        "VM {vm} still runs here as process {pid}, from before host {host} was removed from the cell; end it first: kill {pid}"
    )]
    Runs {
        /// The VM.
        vm: VmId,
        /// Its QEMU.
        pid: u32,
        /// This host, as it was called then.
        host: HostId,
    },
    /// Whether a VM still runs cannot be known.
    #[error("whether VM {vm} still runs here cannot be known")]
    Unknown {
        /// The VM.
        vm: VmId,
        /// Why.
        source: qemu::AdoptError,
    },
    /// An agent works with it.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// What is left of it cannot be removed.
    #[error("cannot remove {}", path.display())]
    Remove {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel's boot is not known.
    #[error("the kernel does not tell its boot id")]
    Boot(#[source] io::Error),
}

/// Asks the controller whether this host is still of its cell. Takes some seconds at most.
///
/// # Errors
/// [`StateError`] where this host has no membership that could be asked about.
pub async fn standing(config: &AgentConfig) -> Result<Standing, StateError> {
    let (membership, identity) = config.membership()?;
    Ok(match session::ask_standing(&membership.controller, &identity).await {
        Err(SessionError::Removed(reason)) => Standing::Removed(reason),
        _ => Standing::Member,
    })
}

/// A membership that is over: nothing of it runs, and no agent works with it while this is held.
pub(crate) struct Former {
    journal: Journal,
    host: HostId,
}

impl Former {
    /// Makes sure that nothing runs of what this host held. Nothing is changed.
    pub(crate) async fn of(config: &AgentConfig, membership: &Membership) -> Result<Self, LeaveError> {
        let boot = facts::boot_id().map_err(LeaveError::Boot)?;
        let journal = Journal::open(&config.journal_path(), boot)?;
        let host = membership.host;
        for vm in vms(config, &journal) {
            match qemu::living(&config.vm_run_dir(vm), vm).await {
                Ok(None) => {}
                Ok(Some(process)) => {
                    let pid = process.pid;
                    return Err(LeaveError::Runs { vm, pid, host });
                }
                Err(source) => return Err(LeaveError::Unknown { vm, source }),
            }
        }
        Ok(Self { journal, host })
    }

    /// Removes what is left of it, the membership first: a crash in between leaves a host that has joined nothing.
    pub(crate) fn forget(self, config: &AgentConfig) -> Result<(), LeaveError> {
        remove(config.membership_path(), |path| fs::remove_file(path))?;
        for vm in vms(config, &self.journal) {
            remove(config.vm_run_dir(vm), |path| fs::remove_dir_all(path))?;
        }
        remove(config.logs_dir(), |path| fs::remove_dir_all(path))?;
        remove(config.journal_path(), |path| fs::remove_file(path))?;
        tracing::info!(host = %self.host, "this host's former membership is over; its journal and logs were removed");
        Ok(())
    }
}

/// The VMs that it had anything to do with: by its journal, and by the directories of their sockets.
fn vms(config: &AgentConfig, journal: &Journal) -> Vec<VmId> {
    let found = fs::read_dir(&config.run_dir).into_iter().flatten().flatten();
    let found = found.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut all: Vec<VmId> = journal.saved().map(|saved| saved.vm).chain(found).collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn remove(path: PathBuf, by: impl FnOnce(&PathBuf) -> io::Result<()>) -> Result<(), LeaveError> {
    match by(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(LeaveError::Remove { path, source }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use model::BootId;
    use task::Saved;
    use uuid::Uuid;

    use super::*;

    fn config(dir: &std::path::Path) -> AgentConfig {
        let config = AgentConfig {
            state_dir: dir.join("state"),
            run_dir: dir.join("run"),
            address: "127.0.0.1".parse().unwrap(),
            pools: vec![],
            bridge: "none0".parse().unwrap(),
            uplink: None,
            gateway: None,
            mtu: 1500,
            qemu: "/nonexistent".into(),
            exe: "/nonexistent".into(),
        };
        config.make_state_dir().unwrap();
        config
    }

    fn membership() -> Membership {
        Membership {
            version: 1,
            host: HostId(Uuid::from_u128(7)),
            name: None,
            cluster: Uuid::from_u128(8),
            controller: "127.0.0.1:1".to_owned(),
        }
    }

    fn with_a_vm(config: &AgentConfig) -> VmId {
        let boot: BootId = facts::boot_id().unwrap();
        let vm = VmId(Uuid::from_u128(1));
        let mut saved = Saved::new(vm, boot);
        saved.role = task::Role::Holder;
        Journal::open(&config.journal_path(), boot)
            .unwrap()
            .append(&saved)
            .unwrap();
        for directory in [config.vm_run_dir(vm), config.vm_log_dir(vm)] {
            fs::create_dir_all(directory).unwrap();
        }
        fs::write(config.vm_log_dir(vm).join("serial.log"), "login: ").unwrap();
        fs::write(config.membership_path(), "{}").unwrap();
        vm
    }

    fn record(config: &AgentConfig, vm: VmId, pid: u32) {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let ticks: u64 = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .nth(19)
            .unwrap()
            .parse()
            .unwrap();
        let text = serde_json::json!({ "pid": pid, "start_ticks": ticks }).to_string();
        fs::write(config.vm_run_dir(vm).join("process.json"), text).unwrap();
    }

    #[tokio::test]
    async fn a_host_that_comes_back_while_a_guest_of_before_runs_is_refused_and_nothing_is_touched() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let vm = with_a_vm(&config);
        let mut guest = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        record(&config, vm, guest.id());
        // Without a monitor that answers: it may run all the same.
        for _ in 0..2 {
            let refused = Former::of(&config, &membership()).await.err().unwrap();
            assert!(
                matches!(&refused, LeaveError::Runs { vm: of, pid, .. } if *of == vm && *pid == guest.id()),
                "{refused}"
            );
            assert!(config.has_joined() && config.vm_log_dir(vm).exists());
        }
        drop(guest.stdin.take());
        guest.wait().unwrap();
        Former::of(&config, &membership()).await.unwrap();
    }

    #[tokio::test]
    async fn a_membership_that_is_over_leaves_nothing_to_take_up() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let vm = with_a_vm(&config);
        // One that its journal does not name.
        let other = VmId(Uuid::from_u128(2));
        fs::create_dir_all(config.vm_run_dir(other)).unwrap();
        drop(UnixListener::bind(config.vm_run_dir(other).join("qmp.sock")).unwrap());
        let former = Former::of(&config, &membership()).await.unwrap();
        assert!(
            matches!(Former::of(&config, &membership()).await, Err(LeaveError::Journal(_))),
            "while an agent works with it"
        );
        former.forget(&config).unwrap();
        assert!(!config.has_joined() && !config.journal_path().exists());
        for gone in [config.vm_run_dir(vm), config.vm_run_dir(other), config.logs_dir()] {
            assert!(!gone.exists(), "{}", gone.display());
        }
        // What a crash in the middle leaves is no obstacle.
        Former::of(&config, &membership())
            .await
            .unwrap()
            .forget(&config)
            .unwrap();
    }
}
