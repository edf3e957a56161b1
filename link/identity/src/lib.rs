//! Who is who in a cluster: its authority, the identities of its nodes, and the mutual TLS built on them.
//!
//! ```text
//!   ClusterAuthority (authority.pem, 0600, on the controller only)
//!        | signs: role and host id as a URI in the certificate
//!        |   godwit://cluster/<uuid>/controller      godwit://cluster/<uuid>/host/<uuid>
//!        v
//!   NodeIdentity (node.pem, 0600; its key never leaves the node) ----> tls::*  rustls configurations
//!        ^                                                              | the peer's role and id are
//!   JoinToken gwj1.<id, secret, fingerprint of the authority>           | checked inside the handshake
//!        one use, expiring; pins the server on first contact            v
//!   ApiToken  gw1_<256 random bits>   (people and scripts)             Peer {cluster, role, expiry}
//! ```
//!
//! Invariants
//! - Identity is the URI in the certificate and nothing else: not the DNS name, not the address, not what a request says.
//!   A certificate with none or with two such URIs has no identity.
//! - A private key is made where it is used. Only a signing request travels; only its public key is taken from it.
//! - A wrong peer fails in the handshake. No byte of the application is exchanged with it.
//! - The controller keeps hashes of tokens, never tokens; secrets are compared in constant time.
//! - A file that holds a secret is 0600 from its first byte, and one that others can read is refused, not repaired.
//! - No process-wide crypto provider: each configuration names aws-lc-rs itself.
//!
//! Certificates are not revoked: a removed host is unknown to the controller, which refuses its id after the handshake,
//! and hosts accept exactly the one peer that the controller names for a migration.

mod api_token;
mod authority;
mod certificate;
mod join;
mod node;
mod random;
mod role;
pub mod secret_file;
pub mod tls;
mod verify;

pub use api_token::{ApiToken, ApiTokenDigest, ApiTokenError};
pub use authority::{AuthorityError, ClusterAuthority, IssueError, NODE_VALIDITY, RENEW_BEFORE};
pub use certificate::{CaCertificate, CertificateError, Fingerprint, pem};
pub use join::{
    Address, AddressError, JoinRecord, JoinTarget, JoinTargetError, JoinToken, JoinTokenError, RedeemError, Redeemed,
};
pub use node::{NodeError, NodeIdentity, NodeKey};
pub use random::{RandomUnavailable, random, same_secret};
pub use role::{Expect, Peer, Role, WrongPeer};
