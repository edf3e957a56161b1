//! Operations: slow work with an id, progress and an end.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{Name, OperationId, ProjectId, Refusal, Timestamp, migration::Migration};

/// A slow piece of work. Every operation ends, by itself if need be: at `ends_by`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// Its id.
    pub id: OperationId,
    /// The project in which it works.
    pub project: ProjectId,
    /// Who asked.
    pub subject: String,
    /// What it does.
    pub kind: OperationKind,
    /// On what.
    pub target: Target,
    /// How far it is.
    pub state: OperationState,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// When it is given up at the latest.
    pub ends_by: Timestamp,
}

/// What an operation does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum OperationKind {
    /// Makes a VM and, unless asked otherwise, starts it.
    CreateVm,
    /// Starts one that is off.
    StartVm,
    /// Asks the guest to power off, then makes it.
    StopVm,
    /// Ends it at once.
    KillVm,
    /// Resets it.
    RebootVm,
    /// Makes it stand.
    PauseVm,
    /// Lets it run again.
    ResumeVm,
    /// Ends it and deletes its disks.
    DeleteVm,
    /// Moves it to another host.
    MigrateVm(Box<Migration>),
    /// Fetches and vets a template's blobs.
    ImportTemplate,
    /// Deletes a template.
    DeleteTemplate,
    /// Removes a host from the cell.
    RemoveHost,
}

impl OperationKind {
    /// Its name for people and programs.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::CreateVm => "create-vm",
            Self::StartVm => "start-vm",
            Self::StopVm => "stop-vm",
            Self::KillVm => "kill-vm",
            Self::RebootVm => "reboot-vm",
            Self::PauseVm => "pause-vm",
            Self::ResumeVm => "resume-vm",
            Self::DeleteVm => "delete-vm",
            Self::MigrateVm(_) => "migrate-vm",
            Self::ImportTemplate => "import-template",
            Self::DeleteTemplate => "delete-template",
            Self::RemoveHost => "remove-host",
        }
    }
}

/// What an operation works on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Target {
    /// `vm`, `template` or `host`.
    pub kind: TargetKind,
    /// Its id.
    pub id: Uuid,
    /// Its name when the operation began.
    pub name: Name,
}

/// Kinds of things that operations and notices are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TargetKind {
    /// A VM.
    Vm,
    /// A template.
    Template,
    /// A host.
    Host,
}

/// How far an operation is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum OperationState {
    /// Under way.
    Running,
    /// Done.
    Succeeded,
    /// Not done.
    Failed {
        /// Why.
        reason: Refusal,
    },
    /// Cancelled by a person.
    Cancelled,
}

impl OperationState {
    /// Whether it is over.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        !matches!(self, Self::Running)
    }

    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed { .. } => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// How far an operation is right now. Telemetry: watched, never stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// What it is doing.
    pub doing: String,
    /// Bytes moved.
    pub bytes: u64,
    /// Bytes left, as known now. Falls, but may rise while a guest writes.
    pub remaining_bytes: Option<u64>,
    /// Round of pre-copy.
    pub round: Option<u64>,
}

impl Operation {
    /// The migration, if that is what it does.
    #[must_use]
    pub fn migration(&self) -> Option<&Migration> {
        match &self.kind {
            OperationKind::MigrateVm(migration) => Some(migration),
            _ => None,
        }
    }

    /// The migration, to change it.
    pub fn migration_mut(&mut self) -> Option<&mut Migration> {
        match &mut self.kind {
            OperationKind::MigrateVm(migration) => Some(migration),
            _ => None,
        }
    }
}
