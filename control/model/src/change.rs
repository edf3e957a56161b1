//! What is stored: rows, and changes of rows.

use serde::{Deserialize, Serialize};

use crate::{
    AuditEntry, AuditId, Host, HostId, Network, NetworkId, Notice, Operation, OperationId, Order, Pool, PoolId, Port,
    PortId, Project, ProjectId, SecurityGroup, SecurityGroupId, Subnet, SubnetId, Template, TemplateId, Timestamp,
    TokenId, User, UserId, Vm, VmId, Volume, VolumeId,
    access::{ApiToken, JoinToken},
    order::Subject,
    seed::SeedRow,
};

/// One row of the durable world.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "row", rename_all = "kebab-case")]
pub enum Row {
    /// A project.
    Project(Project),
    /// A host.
    Host(Box<Host>),
    /// A pool.
    Pool(Pool),
    /// A volume.
    Volume(Volume),
    /// A network.
    Network(Network),
    /// A subnet.
    Subnet(Subnet),
    /// A port.
    Port(Port),
    /// A template.
    Template(Box<Template>),
    /// A VM.
    Vm(Box<Vm>),
    /// An operation.
    Operation(Box<Operation>),
    /// A join token.
    JoinToken(JoinToken),
    /// An API token.
    ApiToken(ApiToken),
    /// An order that a host has not answered.
    Outbox(Box<OutboxRow>),
    /// The answer to a request with an idempotency key.
    Answer(Answer),
    /// An entry of the stream of notices. Bounded: the oldest go.
    Notice(Box<Notice>),
    /// A user.
    User(Box<User>),
    /// An entry of the audit log. It is only written: the world in memory never holds it.
    Audit(Box<AuditEntry>),
    /// What a VM's guest is told at its first start.
    Seed(Box<SeedRow>),
    /// A security group.
    SecurityGroup(Box<SecurityGroup>),
}

/// The newest order about a subject that a host has not answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutboxRow {
    /// The host.
    pub host: HostId,
    /// The order.
    pub order: Order,
}

/// The answer to a request with an idempotency key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The project.
    pub project: ProjectId,
    /// The client's key.
    pub key: String,
    /// SHA-256 of the request.
    pub body_hash: [u8; 32],
    /// What it led to.
    pub operation: OperationId,
    /// When; it is kept for a day.
    pub at: Timestamp,
}

/// Names a row.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// A project.
    Project(ProjectId),
    /// A host.
    Host(HostId),
    /// A pool.
    Pool(PoolId),
    /// A volume.
    Volume(VolumeId),
    /// A network.
    Network(NetworkId),
    /// A subnet.
    Subnet(SubnetId),
    /// A port.
    Port(PortId),
    /// A template.
    Template(TemplateId),
    /// A VM.
    Vm(VmId),
    /// An operation.
    Operation(OperationId),
    /// A join token.
    JoinToken(TokenId),
    /// An API token.
    ApiToken(TokenId),
    /// An order of the outbox.
    Outbox(HostId, Subject),
    /// An answer.
    Answer(ProjectId, String),
    /// A notice.
    Notice(crate::id::Sequence),
    /// A user.
    User(UserId),
    /// An entry of the audit log.
    Audit(AuditId),
    /// What a VM's guest is told.
    Seed(VmId),
    /// A security group.
    SecurityGroup(SecurityGroupId),
}

/// A change of the durable world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The row is as given, whether or not it was there.
    Put(Row),
    /// The row is gone.
    Delete(Key),
}

impl Row {
    /// Its key.
    #[must_use]
    pub fn key(&self) -> Key {
        match self {
            Self::Project(row) => Key::Project(row.id),
            Self::Host(row) => Key::Host(row.id),
            Self::Pool(row) => Key::Pool(row.id),
            Self::Volume(row) => Key::Volume(row.id),
            Self::Network(row) => Key::Network(row.id),
            Self::Subnet(row) => Key::Subnet(row.id),
            Self::Port(row) => Key::Port(row.id),
            Self::Template(row) => Key::Template(row.id),
            Self::Vm(row) => Key::Vm(row.id),
            Self::Operation(row) => Key::Operation(row.id),
            Self::JoinToken(row) => Key::JoinToken(row.id),
            Self::ApiToken(row) => Key::ApiToken(row.id),
            Self::Outbox(row) => Key::Outbox(row.host, row.order.subject()),
            Self::Answer(row) => Key::Answer(row.project, row.key.clone()),
            Self::Notice(row) => Key::Notice(row.sequence),
            Self::User(row) => Key::User(row.id),
            Self::Audit(row) => Key::Audit(row.id),
            Self::Seed(row) => Key::Seed(row.vm),
            Self::SecurityGroup(row) => Key::SecurityGroup(row.id),
        }
    }
}
