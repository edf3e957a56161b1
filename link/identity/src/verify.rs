//! The rustls verifiers: chain to our authority, then the role. A wrong peer fails inside the handshake.

use std::borrow::Cow;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme};
use uuid::Uuid;

use crate::certificate::{CaCertificate, Fingerprint};
use crate::role::{Expect, Peer, WrongPeer};

/// The server that was reached does not show the authority that the join token names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the server is not of the cluster whose authority has the fingerprint {0}; the token or the address is of another cluster, or somebody is in between"
)]
pub struct NotPinned(pub Fingerprint);

fn refuse(why: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::InvalidCertificate(rustls::CertificateError::Other(OtherError(Arc::new(why))))
}

fn check_role(certificate: &CertificateDer<'_>, cluster: Uuid, expected: Expect) -> Result<(), Error> {
    let peer = Peer::of_certificate(certificate).map_err(refuse)?;
    if peer.cluster != cluster {
        return Err(refuse(WrongPeer::Cluster {
            expected: cluster,
            found: peer.cluster,
        }));
    }
    if !expected.admits(peer.role) {
        return Err(refuse(WrongPeer::Role {
            expected,
            found: peer.role,
        }));
    }
    Ok(())
}

/// Whether `authority` signed `certificate`, whatever the time is.
pub(crate) fn signed_by(certificate: &CertificateDer<'_>, authority: &CaCertificate) -> bool {
    use x509_parser::prelude::{FromDer as _, X509Certificate};
    let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
        return false;
    };
    let begin = u64::try_from(parsed.validity().not_before.timestamp()).unwrap_or(0);
    let at = UnixTime::since_unix_epoch(std::time::Duration::from_secs(begin));
    chain(certificate, authority, at, &algorithms).is_ok()
}

fn chain(
    certificate: &CertificateDer<'_>,
    authority: &CaCertificate,
    now: UnixTime,
    algorithms: &WebPkiSupportedAlgorithms,
) -> Result<(), Error> {
    let parsed = ParsedCertificate::try_from(certificate)?;
    verify_server_cert_signed_by_trust_anchor(&parsed, &authority.roots()?, &[], now, algorithms.all)
}

/// Whose authority a server's certificate must chain to.
#[derive(Debug)]
pub(crate) enum Authority {
    /// Ours.
    Known(CaCertificate),
    /// The one with this fingerprint; the server sends it along.
    Pinned(Fingerprint),
}

/// Accepts a server of the authority's cluster with the expected role, whatever its name and address are.
#[derive(Debug)]
pub(crate) struct ServerRole {
    pub(crate) authority: Authority,
    pub(crate) expected: Expect,
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
}

impl Authority {
    /// The authority itself; `sent` are the certificates that came with the server's.
    fn certificate(&self, sent: &[CertificateDer<'_>]) -> Result<Cow<'_, CaCertificate>, Error> {
        let pinned = match self {
            Self::Known(authority) => return Ok(Cow::Borrowed(authority)),
            Self::Pinned(pinned) => *pinned,
        };
        let found = sent.iter().find(|sent| Fingerprint::of(sent) == pinned);
        let found = found.ok_or_else(|| refuse(NotPinned(pinned)))?;
        CaCertificate::from_der(found.to_vec()).map(Cow::Owned).map_err(refuse)
    }
}

impl ServerCertVerifier for ServerRole {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let authority = self.authority.certificate(intermediates)?;
        chain(end_entity, &authority, now, &self.algorithms)?;
        // Also of a pinned authority: a host of the cluster must not pose as its controller, or it would learn the token's secret.
        check_role(end_entity, authority.cluster(), self.expected)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Requires a client certificate of our cluster with the expected role.
#[derive(Debug)]
pub(crate) struct ClientRole {
    chain: Arc<dyn ClientCertVerifier>,
    cluster: Uuid,
    expected: Expect,
}

impl ClientRole {
    pub(crate) fn new(
        authority: &CaCertificate,
        expected: Expect,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, Error> {
        let roots = Arc::new(authority.roots()?);
        let chain = WebPkiClientVerifier::builder_with_provider(roots, provider)
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        Ok(Self {
            chain,
            cluster: authority.cluster(),
            expected,
        })
    }
}

impl ClientCertVerifier for ClientRole {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Peers have one certificate each; naming the authority would only tell strangers which cluster this is.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        check_role(end_entity, self.cluster, self.expected)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// The ordinary check by name, for people's tools on the API port.
pub(crate) fn by_name(
    authority: &CaCertificate,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, Error> {
    WebPkiServerVerifier::builder_with_provider(Arc::new(authority.roots()?), provider)
        .build()
        .map_err(|error| Error::General(error.to_string()))
}
