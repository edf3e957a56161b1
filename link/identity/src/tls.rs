//! The rustls configurations of every link, and the handshake under a deadline.
//!
//! | link | server | client |
//! |---|---|---|
//! | agent to controller | [`agents_port`] | [`to_controller`] |
//! | host to host (migration) | [`from_host`] | [`to_host`] |
//! | joining | [`api_port`] | [`joining`] |
//! | people to the API | [`api_port`] | [`to_api`] |

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::{ClientSessionMemoryCache, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider};
use rustls::pki_types::ServerName;
use rustls::server::{NoServerSessionStorage, ServerSessionMemoryCache};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, CommonState, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use uuid::Uuid;

pub use crate::verify::NotPinned;

use crate::certificate::{CaCertificate, CertificateError, Fingerprint};
use crate::node::NodeIdentity;
use crate::role::{Expect, Peer, WrongPeer};
use crate::verify::{Authority, ClientRole, ServerRole, by_name};

const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";
/// Sessions remembered for resumption on a host-to-host link: one migration has at most this many connections.
const SESSIONS_MAX: usize = 64;

/// Why there is no configuration, connection or identity.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// rustls refused the key or certificate.
    #[error("this node's key and certificate cannot be used for TLS")]
    Configuration(#[from] rustls::Error),
    /// The peer was silent or slow.
    #[error("the peer did not complete the TLS handshake within {0:?}")]
    Deadline(Duration),
    /// The peer is of our cluster, but not the one that this connection is for.
    #[error(transparent)]
    WrongPeer(#[from] WrongPeer),
    /// A joining host reached another cluster.
    #[error(transparent)]
    NotPinned(#[from] NotPinned),
    /// The peer is not one of ours, or it refused us, or speaks something else; the source says which.
    #[error("the TLS handshake failed")]
    Handshake(#[source] io::Error),
    /// The connection has no client certificate.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// The peer's certificate names no role.
    #[error("the peer's certificate is of no use")]
    Certificate(#[from] CertificateError),
}

/// Our crypto: aws-lc-rs, given by name to each configuration. AES-128-GCM first: both ends have AES in hardware, and
/// memory moves through it.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    let mut provider = default_provider();
    let first = cipher_suite::TLS13_AES_128_GCM_SHA256;
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != first.suite());
    Arc::new(provider)
}

fn server(identity: &NodeIdentity, expected: Expect) -> Result<ServerConfig, TlsError> {
    let provider = provider();
    let verifier = ClientRole::new(identity.authority(), expected, provider.clone())?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(vec![identity.certificate().clone()], identity.private_key())?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn client(identity: &NodeIdentity, expected: Expect) -> Result<ClientConfig, TlsError> {
    let provider = provider();
    let verifier = ServerRole {
        authority: Authority::Known(identity.authority().clone()),
        expected,
        algorithms: provider.signature_verification_algorithms,
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(vec![identity.certificate().clone()], identity.private_key())?;
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

/// The controller's port for agents: TLS 1.3, HTTP/2, a host's certificate required. Sessions are not resumed, so each
/// connection proves anew that its certificate is valid.
pub fn agents_port(identity: &NodeIdentity) -> Result<ServerConfig, TlsError> {
    let mut config = server(identity, Expect::AnyHost)?;
    config.alpn_protocols = vec![HTTP2.to_vec()];
    Ok(config)
}

/// An agent's connection to the controller (of its cluster, at whatever address).
pub fn to_controller(identity: &NodeIdentity) -> Result<ClientConfig, TlsError> {
    let mut config = client(identity, Expect::Controller)?;
    config.alpn_protocols = vec![HTTP2.to_vec()];
    Ok(config)
}

/// A port that serves exactly the host `peer`. Sessions are resumed, so that the second and later connections of a
/// migration are cheap; make one configuration for each migration.
pub fn from_host(identity: &NodeIdentity, peer: Uuid) -> Result<ServerConfig, TlsError> {
    let mut config = server(identity, Expect::Host(peer))?;
    config.session_storage = ServerSessionMemoryCache::new(SESSIONS_MAX);
    config.send_tls13_tickets = 2;
    Ok(config)
}

/// Connections to exactly the host `peer`; see [`from_host`].
pub fn to_host(identity: &NodeIdentity, peer: Uuid) -> Result<ClientConfig, TlsError> {
    let mut config = client(identity, Expect::Host(peer))?;
    config.resumption = Resumption::store(Arc::new(ClientSessionMemoryCache::new(SESSIONS_MAX)));
    Ok(config)
}

/// The controller's port for people, tools and joining hosts: TLS 1.2 or newer, no client certificate, HTTP/2 or 1.1. The
/// authority is sent along, so that a joining host can compare it with its token. `identity` is from
/// [`crate::ClusterAuthority::issue_api`].
pub fn api_port(identity: &NodeIdentity) -> Result<ServerConfig, TlsError> {
    let chain = vec![identity.certificate().clone(), identity.authority().der().clone()];
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_no_client_auth()
        .with_single_cert(chain, identity.private_key())?;
    config.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
    Ok(config)
}

/// A new host's first connection: trusts the controller whose authority has the token's fingerprint, and nobody else.
pub fn joining(authority: Fingerprint) -> Result<ClientConfig, TlsError> {
    let provider = provider();
    let verifier = ServerRole {
        authority: Authority::Pinned(authority),
        expected: Expect::Controller,
        algorithms: provider.signature_verification_algorithms,
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
    Ok(config)
}

/// People's tools to the API port: the certificate must be of this authority and for the name that was dialled.
pub fn to_api(authority: &CaCertificate) -> Result<ClientConfig, TlsError> {
    let provider = provider();
    let verifier = by_name(authority, provider.clone())?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_webpki_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
    Ok(config)
}

/// The server name to give where identity is checked by role: the verifier does not look at it and it is not sent.
#[must_use]
pub fn unnamed() -> ServerName<'static> {
    ServerName::IpAddress(rustls::pki_types::IpAddr::from(std::net::Ipv4Addr::UNSPECIFIED))
}

/// Completes a handshake as server within `deadline`; a silent, slow or wrong peer is an error and its socket closed.
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    config: &Arc<ServerConfig>,
    stream: S,
    deadline: Duration,
) -> Result<tokio_rustls::server::TlsStream<S>, TlsError> {
    let handshake = TlsAcceptor::from(config.clone()).accept(stream);
    tokio::time::timeout(deadline, handshake)
        .await
        .map_err(|_| TlsError::Deadline(deadline))?
        .map_err(failed_handshake)
}

/// Completes a handshake as client within `deadline`. With TLS 1.3 a server that refuses our certificate says so only
/// after this: the first read then fails.
pub async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    config: &Arc<ClientConfig>,
    name: ServerName<'static>,
    stream: S,
    deadline: Duration,
) -> Result<tokio_rustls::client::TlsStream<S>, TlsError> {
    let handshake = TlsConnector::from(config.clone()).connect(name, stream);
    tokio::time::timeout(deadline, handshake)
        .await
        .map_err(|_| TlsError::Deadline(deadline))?
        .map_err(failed_handshake)
}

fn failed_handshake(error: io::Error) -> TlsError {
    let refusal = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match (refusal.and_then(refused_as), refusal.and_then(refused_as)) {
        (Some(wrong), _) => TlsError::WrongPeer(wrong),
        (_, Some(wrong)) => TlsError::NotPinned(wrong),
        _ => TlsError::Handshake(error),
    }
}

/// Why one of our verifiers refused a peer ([`WrongPeer`], [`NotPinned`]), out of the error that rustls wraps it in.
#[must_use]
pub fn refused_as<E: std::error::Error + Copy + 'static>(error: &rustls::Error) -> Option<E> {
    match error {
        rustls::Error::InvalidCertificate(rustls::CertificateError::Other(why)) => why.0.downcast_ref().copied(),
        _ => None,
    }
}

/// Who the client of an accepted connection is.
pub fn peer_of<S>(stream: &tokio_rustls::server::TlsStream<S>) -> Result<Peer, TlsError> {
    peer_of_connection(stream.get_ref().1)
}

/// Who the other end of a completed handshake is, for blocking users of rustls.
pub fn peer_of_connection(connection: &CommonState) -> Result<Peer, TlsError> {
    let chain = connection.peer_certificates().ok_or(TlsError::NoCertificate)?;
    Ok(Peer::of_certificate(chain.first().ok_or(TlsError::NoCertificate)?)?)
}
