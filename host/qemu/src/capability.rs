//! What a QEMU can do, asked of it once: version, machine types, migration capabilities, commands, sandbox.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use model::host::{Accelerator, Hypervisor};
use model::layout::Family;
use qmp::{CommandError, ConnectError, Limits, Schema, Session};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};

use crate::program::Program;

/// The oldest QEMU that is driven.
const OLDEST: qmp::VersionTriple = qmp::VersionTriple {
    major: 7,
    minor: 2,
    micro: 0,
};
/// Starting takes 0.1 s; a machine under load may take its time.
const DEADLINE: Duration = Duration::from_secs(30);
const STDERR_BYTES_MAX: u64 = 4096;
/// What a guest's process gives up: system calls that no VM needs.
pub(crate) const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// What a QEMU can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Its version: `10.0.2`.
    pub version: qmp::VersionTriple,
    /// Its distributor's version text.
    pub package: String,
    /// The exact type that each family's alias means: `q35` -> `pc-q35-10.0`.
    pub newest: BTreeMap<Family, String>,
    /// All exact machine types.
    pub machines: BTreeSet<String>,
    /// Migration capabilities that it knows.
    pub migration: BTreeSet<String>,
    /// It was built with seccomp.
    pub sandbox: bool,
    /// Names of its commands and events.
    pub schema: Schema,
}

impl Capabilities {
    /// The same as the model has it, with the accelerator that a probe chose.
    #[must_use]
    pub fn hypervisor(&self, accelerator: Accelerator, accelerator_reason: String) -> Hypervisor {
        Hypervisor {
            kind: "qemu".to_owned(),
            version: self.version.to_string(),
            accelerator,
            accelerator_reason,
            machines: self.newest.clone(),
            machine_types: self.machines.clone(),
            migration: self.migration.clone(),
        }
    }
}

/// Why a QEMU's capabilities are not known.
#[derive(Debug, thiserror::Error)]
pub enum DiscoverError {
    /// It cannot be started.
    #[error("cannot start {program}: is QEMU installed (Debian, Ubuntu: apt install qemu-system-x86)?")]
    Start {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// It ended before it could be asked.
    #[error("{program} ended at once ({status}): {stderr}")]
    Ended {
        /// The program.
        program: String,
        /// How.
        status: ExitStatus,
        /// The start of what it said.
        stderr: String,
    },
    /// It does not speak.
    #[error("{program} does not speak QMP")]
    Connect {
        /// The program.
        program: String,
        /// Why.
        source: ConnectError,
    },
    /// It does not answer a question that every supported QEMU answers.
    #[error("{program} does not say what it can do")]
    Ask {
        /// The program.
        program: String,
        /// Why.
        source: CommandError,
    },
    /// It is too old.
    #[error("{program} is QEMU {version}; Godwit needs {OLDEST} or newer")]
    TooOld {
        /// The program.
        program: String,
        /// Its version.
        version: qmp::VersionTriple,
    },
}

/// Starts `program` without a machine, asks, and ends it.
///
/// # Errors
/// When it cannot be started or asked, or is too old.
pub async fn discover(program: &Program) -> Result<Capabilities, DiscoverError> {
    match ask(program, true).await {
        // A QEMU built without seccomp ends at the sight of -sandbox; one that is broken does so without it, too.
        Err(DiscoverError::Ended { stderr, .. }) if stderr.contains("sandbox") => ask(program, false).await,
        result => result,
    }
}

async fn ask(program: &Program, sandbox: bool) -> Result<Capabilities, DiscoverError> {
    let name = || program.path().display().to_string();
    let start = |source| DiscoverError::Start {
        program: name(),
        source,
    };
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(start)?;
    ours.set_nonblocking(true).map_err(start)?;
    let ours = tokio::net::UnixStream::from_std(ours).map_err(start)?;
    let mut command = program.command();
    command.args([
        "-machine",
        "none",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-S",
    ]);
    // The socket comes as standard input: no path, nothing to wait for, nothing left behind.
    command.args(["-chardev", "socket,id=qmp,fd=0", "-mon", "chardev=qmp,mode=control"]);
    if sandbox {
        command.args(["-sandbox", SANDBOX]);
    }
    command
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut command = Command::from(command);
    let mut child = command.kill_on_drop(true).spawn().map_err(start)?;
    drop(command); // It holds the other end of the socket: the end of QEMU would not be seen.

    let limits = Limits {
        greeting_deadline: DEADLINE,
        command_deadline: DEADLINE,
        ..Limits::default()
    };
    let session = match Session::over(ours, limits).await {
        Ok((session, _events)) => session,
        Err(source) => return Err(failed(program, child, source).await),
    };
    let asked = query(&session, sandbox).await.map_err(|source| DiscoverError::Ask {
        program: name(),
        source,
    })?;
    // It has nothing to save: if it does not end by itself, dropping it kills it.
    let _ = session.execute(qmp::Quit {}).await;
    let _ = tokio::time::timeout(DEADLINE, child.wait()).await;
    if asked.version < OLDEST {
        return Err(DiscoverError::TooOld {
            program: name(),
            version: asked.version,
        });
    }
    Ok(asked)
}

/// What QEMU itself said is better than that its socket closed.
async fn failed(program: &Program, mut child: Child, source: ConnectError) -> DiscoverError {
    let program = program.path().display().to_string();
    if !matches!(source, ConnectError::Closed(_)) {
        return DiscoverError::Connect { program, source };
    }
    let stderr = async {
        let mut said = Vec::new();
        if let Some(stderr) = child.stderr.take() {
            // What came before an error is enough.
            let _ = stderr.take(STDERR_BYTES_MAX).read_to_end(&mut said).await;
        }
        child
            .wait()
            .await
            .map(|status| (status, String::from_utf8_lossy(&said).trim().to_owned()))
    };
    match tokio::time::timeout(DEADLINE, stderr).await {
        Ok(Ok((status, stderr))) => DiscoverError::Ended {
            program,
            status,
            stderr,
        },
        _ => DiscoverError::Connect { program, source },
    }
}

async fn query(session: &Session, sandbox: bool) -> Result<Capabilities, CommandError> {
    let machines = session.execute(qmp::QueryMachines {}).await?;
    let migration = session.execute(qmp::QueryMigrateCapabilities {}).await?;
    let schema = session.execute(qmp::QueryQmpSchema {}).await?;
    let version = session.version();
    let newest = [Family::Q35, Family::Pc].into_iter().filter_map(|family| {
        let machine = machines
            .iter()
            .find(|machine| machine.alias.as_deref() == Some(family.alias()))?;
        Some((family, machine.name.clone()))
    });
    Ok(Capabilities {
        version: version.qemu,
        package: version.package.clone(),
        newest: newest.collect(),
        machines: machines.iter().map(|machine| machine.name.clone()).collect(),
        migration: migration.into_iter().map(|capability| capability.capability).collect(),
        sandbox,
        schema,
    })
}
