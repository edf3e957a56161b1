//! What the engine is told, and what it decides.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    Change, HostId, Name, OperationId, Order, Outcome, ProjectId, Refusal, Report, Request, RequestId, Timestamp,
    id::Sequence,
    operation::{Progress, TargetKind},
};

/// What the engine is told. `now` comes beside it.
#[derive(Clone, Debug)]
pub enum Event {
    /// Somebody asks for something.
    Request(Box<Request>),
    /// A host's agent connected. Its facts and inventory follow as reports.
    Connected(HostId),
    /// A host's agent is gone.
    Disconnected(HostId),
    /// A host tells something.
    Report(HostId, Box<Report>),
    /// Time passed: deadlines, reconciliation.
    Tick,
}

/// What the engine decides. Effects take place only after the commit that covers them.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Write this.
    Change(Box<Change>),
    /// Tell a host, if it is connected; the outbox keeps it otherwise.
    Send(HostId, Box<Order>),
    /// Answer a request.
    Reply(RequestId, Result<Box<Outcome>, Box<Refusal>>),
    /// Tell watchers how far an operation is.
    Progress(OperationId, ProjectId, Progress),
}

/// Something that people and programs may want to know: one entry of the cell's stream of notices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Notice {
    /// Its position in the stream.
    pub sequence: Sequence,
    /// When.
    pub at: Timestamp,
    /// In which project; `None` concerns the cell.
    pub project: Option<ProjectId>,
    /// What happened, stable, dotted: `vm.active`, `host.lost`, `operation.failed`.
    pub what: String,
    /// To which kind of thing.
    pub kind: TargetKind,
    /// To which.
    pub id: Uuid,
    /// Its name.
    pub name: Name,
    /// On behalf of which operation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationId>,
    /// More, for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}
