//! The driver's face: a host's QEMU, its VMs, and what the agent asks of each.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use driver::{Action, Happened, Launch, Process};
use model::VmId;
use model::telemetry::DiskFigures;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::capability::Capabilities;
use crate::launch::{self, AdoptError, Driven, Given, SpawnError};
use crate::monitor::{Asks, Monitor};
use crate::process::Pinned;
use crate::program::Program;

/// Actions that wait; the task gives a few at a time.
const ACTIONS_MAX: usize = 64;
/// What happened and was not read yet. When it is full the monitor waits, and QEMU's events wait in their own bounded queue.
const HAPPENED_MAX: usize = 256;

/// How long QEMU may take to say what its guest read and wrote: nobody needs it later.
const FIGURES_MAX: Duration = Duration::from_secs(1);

/// A host's QEMU. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: Program,
    capabilities: Arc<Capabilities>,
}

/// A VM's process: ask by its [`Handle`], hear by [`Vm::next`]. Dropping this lets the process go on by itself, as a restart of
/// the agent does.
#[derive(Debug)]
pub struct Vm {
    handle: Handle,
    happened: mpsc::Receiver<Happened>,
}

/// Asks things of a VM's process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    actions: mpsc::Sender<Action>,
    figures: mpsc::Sender<oneshot::Sender<DiskFigures>>,
    process: Pinned,
}

/// An action was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ActError {
    /// Too many wait.
    #[error("{ACTIONS_MAX} actions wait already: QEMU does not answer")]
    Overloaded,
    /// The agent may not signal the process: it does not run as root.
    #[error("no permission to end QEMU: the agent must run as root")]
    NotPermitted,
    /// The process is dead; [`Happened::Died`] told so.
    #[error("the process is dead")]
    Dead,
}

impl Qemu {
    /// The QEMU that was found to have these capabilities.
    #[must_use]
    pub fn new(program: Program, capabilities: Capabilities) -> Self {
        Self {
            program,
            capabilities: Arc::new(capabilities),
        }
    }

    /// Starts a VM's process. It outlives the agent. It gets its files and taps as they are given.
    ///
    /// The first thing that the VM tells is [`Happened::Up`].
    ///
    /// # Errors
    /// When it cannot be built or started, or does not answer. Nothing is left of it but its run directory.
    pub async fn spawn(&self, launch: Launch, given: Given) -> Result<Vm, SpawnError> {
        let (run_dir, vm) = (launch.run_dir.clone(), launch.definition.vm);
        let machine = &launch.definition.layout.machine;
        if !self.capabilities.machines.contains(machine) {
            let (machine, version) = (machine.clone(), self.capabilities.version.to_string());
            return Err(SpawnError::Machine { machine, version });
        }
        let driven = launch::launch(&self.program, self.capabilities.sandbox, launch, given).await?;
        Ok(Vm::drive(driven, &run_dir, vm))
    }
}

impl Vm {
    /// Finds a VM's process again, after the agent restarted. What its QEMU can do needs not be known for it.
    ///
    /// The first thing that the VM tells is [`Happened::Up`].
    ///
    /// # Errors
    /// [`AdoptError::Gone`] when there is none. In every other case the guest may run.
    pub async fn adopt(vm: VmId, run_dir: &Path) -> Result<Vm, AdoptError> {
        Ok(Self::drive(launch::adopt(run_dir, vm).await?, run_dir, vm))
    }

    fn drive(driven: Driven, run_dir: &Path, vm: VmId) -> Self {
        let (actions, actions_out) = mpsc::channel(ACTIONS_MAX);
        let (happened_in, happened) = mpsc::channel(HAPPENED_MAX);
        let (figures, figures_out) = mpsc::channel(1);
        let process = driven.held.pinned.clone();
        let monitor = Monitor::new(
            driven,
            run_dir,
            vm,
            Asks {
                actions: actions_out,
                figures: figures_out,
            },
            happened_in,
        );
        tokio::spawn(monitor.run());
        Self {
            handle: Handle {
                actions,
                figures,
                process,
            },
            happened,
        }
    }

    /// What happened next; `None` after [`Happened::Died`].
    pub async fn next(&mut self) -> Option<Happened> {
        self.happened.recv().await
    }

    /// A handle to ask by.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }
}

impl Handle {
    /// The process, for the journal.
    #[must_use]
    pub fn process(&self) -> Process {
        self.process.process()
    }

    /// What the guest read and wrote since its process was started. `None` while it is moved, for a migration's last moments are counted
    /// in milliseconds; and where QEMU does not say at once.
    pub async fn disk_figures(&self) -> Option<DiskFigures> {
        let (reply, answer) = oneshot::channel();
        self.figures.try_send(reply).ok()?;
        timeout(FIGURES_MAX, answer).await.ok()?.ok()
    }

    /// Asks; what [`Vm::next`] tells is the answer. Actions are carried out in order, but [`Action::Kill`] at once.
    ///
    /// # Errors
    /// When it was not taken.
    pub fn act(&self, action: Action) -> Result<(), ActError> {
        if action == Action::Kill {
            // By the pidfd: it hits this process or none. Its death is told.
            return self.process.kill().map_err(|error| {
                tracing::error!(pid = self.process().pid, %error, "cannot kill QEMU");
                ActError::NotPermitted
            });
        }
        self.actions.try_send(action).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => ActError::Overloaded,
            mpsc::error::TrySendError::Closed(_) => ActError::Dead,
        })
    }
}
