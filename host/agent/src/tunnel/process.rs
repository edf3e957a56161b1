//! Starting a tunnel as its own process, and finding it again after the agent was restarted.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};

use super::link::wait;
use super::spec::{SpecError, TunnelSpec};

/// Why a tunnel process is not there.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// Its specification was not written.
    #[error("the tunnel was not started")]
    Spec(#[from] SpecError),
    /// Its log file cannot be made.
    #[error("cannot write {}", path.display())]
    Log {
        /// The log file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The program did not start.
    #[error("cannot start {}", exe.display())]
    Spawn {
        /// The program.
        exe: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No process with this id and start time: it ended, and its id may be another process's now.
    #[error("the tunnel process {0} has ended")]
    Ended(u32),
    /// The kernel refused.
    #[error("cannot watch the tunnel process {pid}")]
    Watch {
        /// Its id.
        pid: u32,
        /// What the system said.
        source: io::Error,
    },
}

/// A running tunnel. Dropping this does not end it.
#[derive(Debug)]
pub struct Running {
    /// Its process id; with the start time it names the process for good, so journal both.
    pub pid: u32,
    /// When it started, in clock ticks since boot (proc_pid_stat(5), field 22).
    pub start_time: u64,
    pidfd: OwnedFd,
}

/// Writes the spec into the tunnel's directory and starts `exe tunnel --spec PATH`: input null, output and errors to
/// `tunnel.log` (the tunnel bounds it), no tie to this process. It enters its own session as its first act.
pub fn spawn(spec: &TunnelSpec, exe: &Path) -> Result<Running, ProcessError> {
    let spec_path = spec.write()?;
    let _ = fs::remove_file(spec.status_path());
    let log_path = spec.directory.join("tunnel.log");
    let log = |source| ProcessError::Log {
        path: log_path.clone(),
        source,
    };
    let out = File::options()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(log)?;
    let err = out.try_clone().map_err(log)?;
    let child = Command::new(exe)
        .arg("tunnel")
        .arg("--spec")
        .arg(&spec_path)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .spawn()
        .map_err(|source| ProcessError::Spawn {
            exe: exe.to_owned(),
            source,
        })?;
    let pid = child.id();
    // Our child cannot be reaped by anybody else, so the id is still its own, even if it has ended already.
    let pidfd = open(pid)?;
    let start_time = start_time(pid).ok_or(ProcessError::Ended(pid))?;
    Ok(Running { pid, start_time, pidfd })
}

/// Finds a tunnel again by what the journal says.
pub fn adopt(pid: u32, start_time: u64) -> Result<Running, ProcessError> {
    let pidfd = open(pid)?;
    // After the descriptor is open the id cannot change hands, so this compares the right process.
    match self::start_time(pid) {
        Some(found) if found == start_time => {}
        _ => return Err(ProcessError::Ended(pid)),
    }
    let running = Running { pid, start_time, pidfd };
    match running.wait_end(Duration::ZERO)? {
        true => Err(ProcessError::Ended(pid)),
        false => Ok(running),
    }
}

impl Running {
    /// Ends it at once: the kernel closes its sockets, and both QEMUs see the end of their stream.
    pub fn kill(&self) -> Result<(), ProcessError> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(ProcessError::Watch {
                pid: self.pid,
                source: error.into(),
            }),
        }
    }

    /// Waits for its end, at most `patience`; says whether it has ended, and reaps it if it is our child. For an event
    /// loop use the descriptor: it becomes readable at the end.
    pub fn wait_end(&self, patience: Duration) -> Result<bool, ProcessError> {
        let watch = |source| ProcessError::Watch { pid: self.pid, source };
        let ended = match patience.is_zero() {
            true => wait(&self.pidfd, PollFlags::IN, Instant::now() + Duration::from_millis(1)),
            false => wait(&self.pidfd, PollFlags::IN, Instant::now() + patience),
        }
        .map_err(watch)?;
        if ended {
            // Fails where an earlier agent was the parent; init reaps it then.
            let _ = waitid(
                WaitId::PidFd(self.pidfd.as_fd()),
                WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
            );
        }
        Ok(ended)
    }
}

impl AsFd for Running {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

fn open(pid: u32) -> Result<OwnedFd, ProcessError> {
    let id = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(ProcessError::Ended(pid))?;
    pidfd_open(id, PidfdFlags::empty()).map_err(|error| match error {
        rustix::io::Errno::SRCH | rustix::io::Errno::INVAL => ProcessError::Ended(pid),
        other => ProcessError::Watch {
            pid,
            source: other.into(),
        },
    })
}

fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, field 2, may hold spaces and parentheses; what follows its last parenthesis is regular.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}
