//! Starting a tunnel as its own process, and finding it again after the agent was restarted.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use driver::Process;
use qemu::Pinned;
use rustix::event::PollFlags;

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

/// The program of tunnels: the very one, whatever becomes of its file. An upgrade that replaces it disturbs no agent that runs.
#[derive(Debug)]
pub struct Program(OwnedFd);

impl Program {
    /// Opens the program at `path`.
    ///
    /// # Errors
    /// When it is not there.
    pub fn open(path: &Path) -> io::Result<Self> {
        use rustix::fs::{Mode, OFlags, open};
        Ok(Self(open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?))
    }

    /// Where to start it, for as long as this lives: a child that this process makes finds it there until it has become the program.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

/// A running tunnel. Dropping this does not end it.
#[derive(Debug, Clone)]
pub struct Running(Pinned);

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
        .arg0("godwit")
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
    let pinned = Pinned::child(child).map_err(|source| ProcessError::Watch { pid, source })?;
    Ok(Running(pinned))
}

/// Finds a tunnel again by what the journal says.
pub fn adopt(process: Process) -> Result<Running, ProcessError> {
    let pid = process.pid;
    let found = Pinned::find(process).map_err(|source| ProcessError::Watch { pid, source })?;
    let running = Running(found.ok_or(ProcessError::Ended(pid))?);
    match running.wait_end(Duration::ZERO)? {
        true => Err(ProcessError::Ended(pid)),
        false => Ok(running),
    }
}

impl Running {
    /// A tunnel that is held already.
    #[cfg(test)]
    pub(crate) fn of(process: Pinned) -> Self {
        Self(process)
    }

    /// Which process it is; this names it for good, so journal it.
    #[must_use]
    pub fn process(&self) -> Process {
        self.0.process()
    }

    /// The process itself, to be watched and reaped by an event loop.
    #[must_use]
    pub fn pinned(&self) -> &Pinned {
        &self.0
    }

    fn watch(&self, source: io::Error) -> ProcessError {
        let pid = self.process().pid;
        ProcessError::Watch { pid, source }
    }

    /// Ends it at once: the kernel closes its sockets, and both QEMUs see the end of their stream.
    pub fn kill(&self) -> Result<(), ProcessError> {
        self.0.kill().map_err(|source| self.watch(source))
    }

    /// Waits for its end, at most `patience`; says whether it has ended, and reaps it if it is our child. For an event
    /// loop use the descriptor: it becomes readable at the end.
    pub fn wait_end(&self, patience: Duration) -> Result<bool, ProcessError> {
        let patience = patience.max(Duration::from_millis(1));
        let ended = wait(&self.0, PollFlags::IN, Instant::now() + patience).map_err(|source| self.watch(source))?;
        if ended {
            // Nothing where an earlier agent was the parent; init reaps it then.
            self.0.reap();
        }
        Ok(ended)
    }
}
