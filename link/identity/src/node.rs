//! A node's own identity: its private key, which never leaves it, and the certificate that the authority gave for it.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::authority::{RENEW_BEFORE, same_key};
use crate::certificate::{CaCertificate, CertificateError, pem};
use crate::role::Peer;
use crate::secret_file::{self, ReadSecretError, WriteSecretError};
use crate::verify::signed_by;

const FILE_BYTES_MAX: u64 = 64 * 1024;

/// Why a node has no usable identity.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The file cannot be read, or others can read it.
    #[error("this node's identity cannot be used")]
    Read(#[from] ReadSecretError),
    /// The file cannot be written.
    #[error("this node's identity was not saved")]
    Write(#[from] WriteSecretError),
    /// A part of it is missing or damaged.
    #[error("the node's certificate is of no use; join the cluster again")]
    Certificate(#[from] CertificateError),
    /// The key is missing, or the certificate is for another key.
    #[error("the node's certificate does not belong to its key; join the cluster again")]
    Key,
    /// The certificate is not signed by the authority that comes with it, or names another cluster.
    #[error("the node's certificate was not issued by this cluster's authority; join the cluster again")]
    Issuer,
    /// A key could not be made.
    #[error("no key could be made")]
    Make(#[from] rcgen::Error),
}

/// A fresh private key, waiting for its certificate.
pub struct NodeKey(KeyPair);

impl NodeKey {
    /// Makes a key on this machine.
    pub fn generate() -> Result<Self, NodeError> {
        Ok(Self(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?))
    }

    /// The signing request (DER, PKCS #10, RFC 2986): the public key, signed by the private one; it claims nothing.
    pub fn request(&self) -> Result<Vec<u8>, NodeError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        Ok(params.serialize_request(&self.0)?.der().to_vec())
    }
}

impl std::fmt::Debug for NodeKey {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "NodeKey(secret)")
    }
}

/// Key, certificate and authority of one node: all that mutual TLS needs.
pub struct NodeIdentity {
    key: KeyPair,
    certificate: CertificateDer<'static>,
    authority: CaCertificate,
    peer: Peer,
}

impl NodeIdentity {
    /// Puts together what belongs together; refuses what does not. Expiry is not looked at here: see
    /// [`Self::renewal_due`], and the peers' handshakes.
    pub fn new(key: NodeKey, certificate: impl Into<Vec<u8>>, authority: CaCertificate) -> Result<Self, NodeError> {
        let certificate = CertificateDer::from(certificate.into());
        let peer = Peer::of_certificate(&certificate)?;
        if !same_key(&certificate, &key.0) {
            return Err(NodeError::Key);
        }
        if peer.cluster != authority.cluster() || !signed_by(&certificate, &authority) {
            return Err(NodeError::Issuer);
        }
        Ok(Self {
            key: key.0,
            certificate,
            authority,
            peer,
        })
    }

    /// Reads the file that [`Self::save`] wrote; refuses one that others can read.
    pub fn load(path: &Path) -> Result<Self, NodeError> {
        let file = secret_file::read(path, FILE_BYTES_MAX)?;
        let text = std::str::from_utf8(&file).map_err(|_| NodeError::Key)?;
        let key = KeyPair::from_pem(text).map_err(|_| NodeError::Key)?;
        let mut certificates =
            CertificateDer::pem_slice_iter(&file).map(|c| c.map_err(|_| CertificateError::Malformed));
        let mut next = || certificates.next().ok_or(CertificateError::Malformed)?;
        let (own, authority) = (next()?, next()?);
        Self::new(NodeKey(key), own.to_vec(), CaCertificate::from_der(authority.to_vec())?)
    }

    /// Writes key, certificate and authority as one PEM file (0600), replacing an older one in one step, so that a crash
    /// never leaves the key of one beside the certificate of another.
    pub fn save(&self, path: &Path) -> Result<(), NodeError> {
        let file = format!(
            "{}{}{}",
            self.key.serialize_pem(),
            pem("CERTIFICATE", &self.certificate),
            self.authority.to_pem()
        );
        Ok(secret_file::replace(path, file.as_bytes())?)
    }

    /// Who this node is.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// The authority that it trusts.
    #[must_use]
    pub fn authority(&self) -> &CaCertificate {
        &self.authority
    }

    /// Its certificate, in DER.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// How long until it should renew (with a new key, over a connection made with this identity); zero when it is due.
    #[must_use]
    pub fn renewal_due(&self, now: SystemTime) -> Duration {
        self.peer
            .not_after
            .duration_since(now)
            .unwrap_or_default()
            .saturating_sub(RENEW_BEFORE)
    }

    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()))
    }
}

impl std::fmt::Debug for NodeIdentity {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "NodeIdentity({} of cluster {})", self.peer.role, self.peer.cluster)
    }
}
