//! What a certificate says about its holder: cluster, role, host id; and what a connection may expect of it.

use std::fmt;
use std::time::{Duration, SystemTime};

use uuid::Uuid;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::certificate::CertificateError;

pub(crate) const SCHEME: &str = "godwit://cluster/";

/// What a node is in its cluster. A host is the id in its certificate, not its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The process that decides and remembers.
    Controller,
    /// The agent (and its tunnels) of the host with this id.
    Host(Uuid),
}

impl Role {
    /// The URI that stands for this role of `cluster` in a certificate.
    #[must_use]
    pub fn uri(self, cluster: Uuid) -> String {
        match self {
            Self::Controller => format!("{SCHEME}{cluster}/controller"),
            Self::Host(id) => format!("{SCHEME}{cluster}/host/{id}"),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Controller => write!(out, "the controller"),
            Self::Host(id) => write!(out, "host {id}"),
        }
    }
}

/// The authenticated holder of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// The cluster that it belongs to.
    pub cluster: Uuid,
    /// What it is there.
    pub role: Role,
    /// When its certificate ends.
    pub not_after: SystemTime,
}

impl Peer {
    /// Reads the identity of a certificate. This says what the certificate *claims*: the chain is checked by the handshake.
    pub fn of_certificate(der: &[u8]) -> Result<Self, CertificateError> {
        let (rest, certificate) = X509Certificate::from_der(der).map_err(|_| CertificateError::Malformed)?;
        if !rest.is_empty() {
            return Err(CertificateError::Malformed);
        }
        let mut found = None;
        for uri in godwit_uris(&certificate)? {
            if found
                .replace(parse_role(uri).ok_or(CertificateError::NoIdentity)?)
                .is_some()
            {
                return Err(CertificateError::NoIdentity);
            }
        }
        let (cluster, role) = found.ok_or(CertificateError::NoIdentity)?;
        let not_after = time_of(certificate.validity().not_after.timestamp());
        Ok(Self {
            cluster,
            role,
            not_after,
        })
    }
}

/// All URIs of our scheme in a certificate.
pub(crate) fn godwit_uris<'a>(certificate: &'a X509Certificate<'_>) -> Result<Vec<&'a str>, CertificateError> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| CertificateError::Malformed)?;
    Ok(names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) if uri.starts_with("godwit:") => Some(*uri),
            _ => None,
        })
        .collect())
}

pub(crate) fn time_of(unix_seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(unix_seconds).unwrap_or(0))
}

/// Accepts only what [`Role::uri`] writes, to the letter: one spelling for one identity.
fn parse_role(uri: &str) -> Option<(Uuid, Role)> {
    let mut parts = uri.strip_prefix(SCHEME)?.split('/');
    let cluster = parts.next()?.parse().ok()?;
    let role = match (parts.next()?, parts.next(), parts.next()) {
        ("controller", None, None) => Role::Controller,
        ("host", Some(id), None) => Role::Host(id.parse().ok()?),
        _ => return None,
    };
    (role.uri(cluster) == uri).then_some((cluster, role))
}

/// Whom a connection is meant to reach or to serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// The controller.
    Controller,
    /// Any host of the cluster.
    AnyHost,
    /// Exactly the host with this id.
    Host(Uuid),
}

impl Expect {
    /// Whether `role` is one that was expected.
    #[must_use]
    pub fn admits(self, role: Role) -> bool {
        match (self, role) {
            (Self::Controller, Role::Controller) | (Self::AnyHost, Role::Host(_)) => true,
            (Self::Host(expected), Role::Host(id)) => expected == id,
            _ => false,
        }
    }
}

impl fmt::Display for Expect {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Controller => write!(out, "the controller"),
            Self::AnyHost => write!(out, "a host"),
            Self::Host(id) => write!(out, "host {id}"),
        }
    }
}

/// The peer is of our cluster, but is not the one that this connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WrongPeer {
    /// Another role, or another host.
    #[error("the peer is {found}, but this connection is for {expected}")]
    Role {
        /// Whom the connection is for.
        expected: Expect,
        /// Who answered.
        found: Role,
    },
    /// A certificate that names another cluster.
    #[error("the peer belongs to cluster {found}, not to {expected}")]
    Cluster {
        /// Our cluster.
        expected: Uuid,
        /// The peer's.
        found: Uuid,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_has_exactly_one_spelling() {
        let (cluster, host) = (Uuid::from_u128(7), Uuid::from_u128(9));
        for role in [Role::Controller, Role::Host(host)] {
            assert_eq!(parse_role(&role.uri(cluster)), Some((cluster, role)));
        }
        for bad in [
            String::new(),
            format!("{SCHEME}{cluster}"),
            format!("{SCHEME}{cluster}/"),
            format!("{SCHEME}{cluster}/controller/"),
            format!("{SCHEME}{cluster}/Controller"),
            format!("{SCHEME}{cluster}/host"),
            format!("{SCHEME}{cluster}/host/"),
            format!("{SCHEME}{cluster}/host/{host}/x"),
            format!("{SCHEME}{cluster}/host/{}", host.simple()),
            format!(
                "{SCHEME}{cluster}/host/{}",
                host.to_string().to_uppercase().replace('0', "A")
            ),
            format!("{SCHEME}{}/controller", cluster.simple()),
            format!("http://cluster/{cluster}/controller"),
        ] {
            assert_eq!(parse_role(&bad), None, "{bad}");
        }
    }

    #[test]
    fn an_expectation_admits_nobody_else() {
        let (a, b) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let cases = [
            (Expect::Controller, [true, false, false]),
            (Expect::AnyHost, [false, true, true]),
            (Expect::Host(a), [false, true, false]),
        ];
        for (expect, admitted) in cases {
            for (role, admitted) in [Role::Controller, Role::Host(a), Role::Host(b)]
                .into_iter()
                .zip(admitted)
            {
                assert_eq!(expect.admits(role), admitted, "{expect} {role}");
            }
        }
    }
}
