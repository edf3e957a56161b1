//! The authority's public certificate, its fingerprint, and PEM.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::role::{SCHEME, godwit_uris};

/// Why a certificate is of no use here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Not PEM, not DER, or not one certificate.
    #[error("this is not an X.509 certificate")]
    Malformed,
    /// It has no godwit:// URI, or more than one, or one that is not spelt as ours are.
    #[error("the certificate names no role in a cluster (one godwit://cluster/... URI is needed)")]
    NoIdentity,
    /// It may not sign others.
    #[error("the certificate is not a cluster authority's")]
    NotAnAuthority,
}

/// SHA-256 of the DER form of the authority's certificate; 64 hexadecimal digits in text.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// The fingerprint of a certificate in DER.
    #[must_use]
    pub fn of(der: &[u8]) -> Self {
        Self(Sha256::digest(der).into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(out, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

impl FromStr for Fingerprint {
    type Err = FingerprintError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.as_bytes();
        if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(FingerprintError);
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| FingerprintError)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| FingerprintError)?;
        }
        Ok(Self(bytes))
    }
}

/// Not 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a fingerprint is 64 hexadecimal digits")]
pub struct FingerprintError;

/// The public half of the cluster's authority: what every node trusts.
#[derive(Clone, PartialEq, Eq)]
pub struct CaCertificate {
    der: CertificateDer<'static>,
    cluster: Uuid,
}

impl CaCertificate {
    /// Reads DER; refuses anything but an authority's certificate with one cluster id.
    pub fn from_der(der: impl Into<Vec<u8>>) -> Result<Self, CertificateError> {
        let der = CertificateDer::from(der.into());
        let (rest, certificate) = X509Certificate::from_der(&der).map_err(|_| CertificateError::Malformed)?;
        if !rest.is_empty() {
            return Err(CertificateError::Malformed);
        }
        if !certificate.is_ca() {
            return Err(CertificateError::NotAnAuthority);
        }
        let uris = godwit_uris(&certificate)?;
        let [uri] = uris.as_slice() else {
            return Err(CertificateError::NoIdentity);
        };
        let id = uri.strip_prefix(SCHEME).ok_or(CertificateError::NoIdentity)?;
        let cluster: Uuid = id.parse().map_err(|_| CertificateError::NoIdentity)?;
        if cluster.to_string() != id {
            return Err(CertificateError::NoIdentity);
        }
        Ok(Self { der, cluster })
    }

    /// Reads the first certificate of a PEM text.
    pub fn from_pem(pem: &[u8]) -> Result<Self, CertificateError> {
        let der = CertificateDer::from_pem_slice(pem).map_err(|_| CertificateError::Malformed)?;
        Self::from_der(der.to_vec())
    }

    /// PEM, for a file that anybody may read.
    #[must_use]
    pub fn to_pem(&self) -> String {
        pem("CERTIFICATE", &self.der)
    }

    /// DER.
    #[must_use]
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// The cluster that this authority signs for.
    #[must_use]
    pub fn cluster(&self) -> Uuid {
        self.cluster
    }

    /// What a join token pins.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.der)
    }

    /// A trust store that holds this authority alone.
    pub(crate) fn roots(&self) -> Result<RootCertStore, rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone())?;
        Ok(roots)
    }
}

impl fmt::Debug for CaCertificate {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "CaCertificate(cluster {}, {})", self.cluster, self.fingerprint())
    }
}

/// One PEM block (RFC 7468): `CERTIFICATE` and its DER form, for one.
pub fn pem(label: &str, der: &[u8]) -> String {
    let body = STANDARD.encode(der);
    let lines: Vec<&str> = body
        .as_bytes()
        .chunks(64)
        .filter_map(|line| std::str::from_utf8(line).ok())
        .collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}
