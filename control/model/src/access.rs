//! Who asks, for which project, with what right.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Name, ProjectId, Timestamp, TokenId};

/// A tenant: every VM, volume, network and operation belongs to one. Project `default` always exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Project {
    /// Its id.
    pub id: ProjectId,
    /// Its name, unique in the cell.
    pub name: Name,
    /// What its VMs may hold at most.
    #[serde(default)]
    pub quota: Quota,
    /// What its VMs hold; changed in the transaction that creates or deletes them.
    #[serde(default)]
    pub used: Usage,
}

/// Upper bounds of a project; `None` is no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quota {
    /// VMs that exist.
    pub vms: Option<u64>,
    /// Sum of their vCPUs.
    pub vcpus: Option<u64>,
    /// Sum of their memory, MiB.
    pub memory_mib: Option<u64>,
}

/// What a project's VMs hold, running or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// VMs that exist.
    pub vms: u64,
    /// Sum of their vCPUs.
    pub vcpus: u64,
    /// Sum of their memory, MiB.
    pub memory_mib: u64,
}

/// What a subject may do; each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Reads its project.
    Viewer,
    /// Starts, stops and moves VMs of its project.
    Operator,
    /// Creates and deletes in its project.
    ProjectAdmin,
    /// Everything: hosts, templates, tokens, all projects.
    CloudAdmin,
}

/// Who asks. Every call to the controller's handle carries one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Actor {
    /// The person or service, as its token names it.
    pub subject: String,
    /// The project it speaks for.
    pub project: ProjectId,
    /// Its right there.
    pub role: Role,
}

/// SHA-256 of a token's secret. The secret itself is shown once and kept nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenHash(pub [u8; 32]);

/// Lets one host join the cell, once, before it expires.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    /// Its id, part of the token's text.
    pub id: TokenId,
    /// Hash of its secret.
    pub hash: TokenHash,
    /// When it stops being valid.
    pub expires_at: Timestamp,
    /// Who made it.
    pub created_by: String,
}

/// Lets a client use the interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiToken {
    /// Its id.
    pub id: TokenId,
    /// Hash of its secret.
    pub hash: TokenHash,
    /// Whom it speaks for.
    pub actor: Actor,
    /// When it stops being valid; `None` never.
    pub expires_at: Option<Timestamp>,
}
