//! Joining the cell, and renewing a host's certificate.

use model::{HostId, Name};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::Ticket;

/// Where a new host joins, at the interface's port.
pub const JOIN_PATH: &str = "/v1/join";

/// Longest body of a join or renewal, bytes.
pub const BODY_BYTES_MAX: usize = 64 << 10;

/// A new host asks to join.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinRequest {
    /// The join token's text.
    #[schema(value_type = String)]
    pub token: Ticket,
    /// Its signing request (PKCS #10, PEM): its public key, signed by the private key that never leaves it.
    pub csr_pem: String,
    /// The name it would like.
    pub name: Name,
}

/// It has joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinResponse {
    /// Its id from now on.
    pub host: HostId,
    /// Its name from now on: another than it wished for where that was taken. `None` from controllers that did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// Its certificate, PEM.
    pub certificate_pem: String,
    /// The cluster's authority, PEM.
    pub ca_pem: String,
    /// `HOST:PORT` of the controller's port for agents.
    pub agent_endpoint: String,
    /// The cluster's id.
    pub cluster: Uuid,
}

/// A host asks for a new certificate, over a connection made with its present one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewRequest {
    /// A signing request with a new key, PEM.
    pub csr_pem: String,
}

/// Its new certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewResponse {
    /// PEM.
    pub certificate_pem: String,
}
