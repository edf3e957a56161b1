//! The cluster's certificate authority: made once, kept on the controller, signs every node's certificate.
//!
//! Keys are ECDSA P-256: browsers, which reach the API port, do not take Ed25519 certificates, and one kind of key
//! everywhere leaves one path to test.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData as _,
    SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::certificate::{CaCertificate, CertificateError, Fingerprint};
use crate::random::{RandomUnavailable, random};
use crate::role::{Role, SCHEME};
use crate::secret_file::{self, ReadSecretError, WriteSecretError};

/// How long a node's certificate is valid.
pub const NODE_VALIDITY: Duration = Duration::from_secs(90 * DAY_SECONDS);

/// A node renews when less than this is left of its certificate: it may be switched off for two months and still rejoin.
pub const RENEW_BEFORE: Duration = Duration::from_secs(60 * DAY_SECONDS);

const DAY_SECONDS: u64 = 24 * 60 * 60;
const AUTHORITY_VALIDITY: Duration = Duration::from_secs(50 * 365 * DAY_SECONDS);
/// Certificates begin this much before they are issued, so that a node whose clock is behind accepts them.
const BACKDATED: Duration = Duration::from_secs(DAY_SECONDS);
const AUTHORITY_FILE: &str = "authority.pem";
const CERTIFICATE_FILE: &str = "cluster.crt";
const FILE_BYTES_MAX: u64 = 64 * 1024;
const REQUEST_BYTES_MAX: usize = 8 * 1024;
const NAMES_MAX: usize = 64;

/// Why the authority could not be made or loaded.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The state directory or the files in it cannot be written.
    #[error("the cluster authority was not created")]
    Write(#[from] WriteSecretError),
    /// Its file cannot be read, or is open to others.
    #[error("the cluster authority cannot be used")]
    Read(#[from] ReadSecretError),
    /// The file's certificate is not an authority's.
    #[error("{AUTHORITY_FILE} is damaged; restore it from a backup")]
    Certificate(#[from] CertificateError),
    /// The file's key is missing, or does not belong to its certificate.
    #[error("{AUTHORITY_FILE} is damaged (its key is missing or of another certificate); restore it from a backup")]
    Key,
    /// A key or certificate could not be made.
    #[error("the cluster authority's certificate could not be made")]
    Make(#[from] rcgen::Error),
    /// No randomness.
    #[error(transparent)]
    Random(#[from] RandomUnavailable),
}

/// Why a certificate was not issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// Not a signing request, or one whose signature is not by the key inside it (RFC 2986).
    #[error("the signing request is malformed, or not signed by its own key")]
    Request,
    /// A key of another kind.
    #[error("the signing request holds a key of another kind; an ECDSA P-256 key is needed")]
    KeyKind,
    /// A name that is neither a DNS name nor an address, or too many of them.
    #[error("{0:?} is neither a DNS name nor an IP address (at most {NAMES_MAX} of them)")]
    Name(String),
    /// The signature could not be made.
    #[error("the certificate could not be signed")]
    Sign(#[from] rcgen::Error),
    /// No randomness for the serial number.
    #[error(transparent)]
    Random(#[from] RandomUnavailable),
}

/// The key that signs node certificates, with its certificate.
pub struct ClusterAuthority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CaCertificate,
}

impl ClusterAuthority {
    /// Makes the authority of a new cluster in `directory` (made 0700 if it is not there): `authority.pem` (0600: key and
    /// certificate) and `cluster.crt`. Refuses if there is one already.
    pub fn create(directory: &Path, cluster: Uuid, now: SystemTime) -> Result<Self, AuthorityError> {
        secret_file::private_directory(directory)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = params_from(now, AUTHORITY_VALIDITY)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = common_name(format!("Godwit cluster {cluster}"));
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(format!("{SCHEME}{cluster}"))?)];
        let certificate = CaCertificate::from_der(params.self_signed(&key)?.der().to_vec())?;
        let file = format!("{}{}", key.serialize_pem(), certificate.to_pem());
        secret_file::create(&directory.join(AUTHORITY_FILE), file.as_bytes())?;
        Self::load(directory)
    }

    /// Loads the authority that [`Self::create`] made; refuses key files that others can read.
    pub fn load(directory: &Path) -> Result<Self, AuthorityError> {
        let file = secret_file::read(&directory.join(AUTHORITY_FILE), FILE_BYTES_MAX)?;
        let certificate = CaCertificate::from_pem(&file)?;
        let text = std::str::from_utf8(&file).map_err(|_| AuthorityError::Key)?;
        let key = KeyPair::from_pem(text).map_err(|_| AuthorityError::Key)?;
        if !same_key(certificate.der(), &key) {
            return Err(AuthorityError::Key);
        }
        let public = directory.join(CERTIFICATE_FILE);
        if std::fs::read(&public).ok().as_deref() != Some(certificate.to_pem().as_bytes()) {
            // Only a copy for people and tools to read; the pair above is what counts.
            std::fs::write(&public, certificate.to_pem())
                .map_err(|source| WriteSecretError::Io { path: public, source })?;
        }
        let issuer = Issuer::from_ca_cert_der(certificate.der(), key)?;
        Ok(Self { issuer, certificate })
    }

    /// [`Self::load`], or [`Self::create`] where nothing is yet. `cluster` is used only by the latter.
    pub fn load_or_create(directory: &Path, cluster: Uuid, now: SystemTime) -> Result<Self, AuthorityError> {
        if directory.join(AUTHORITY_FILE).exists() {
            return Self::load(directory);
        }
        match Self::create(directory, cluster, now) {
            Err(AuthorityError::Write(WriteSecretError::Exists { .. })) => Self::load(directory),
            outcome => outcome,
        }
    }

    /// What every node trusts.
    #[must_use]
    pub fn certificate(&self) -> &CaCertificate {
        &self.certificate
    }

    /// Signs the key of a request (DER, PKCS #10) for `role`, which the caller decides; names and everything else that the
    /// request asks for is ignored. Valid for [`NODE_VALIDITY`], as client and as server.
    pub fn issue(&self, request: &[u8], role: Role, now: SystemTime) -> Result<CertificateDer<'static>, IssueError> {
        let usages = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(request, role, Vec::new(), &usages, now)
    }

    /// Signs the controller's key for its API port, reached by people under `names` (DNS names and IP addresses). It
    /// serves only; it cannot be used to dial others.
    pub fn issue_api(
        &self,
        request: &[u8],
        names: &[String],
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, IssueError> {
        if let Some(excess) = names.get(NAMES_MAX) {
            return Err(IssueError::Name(excess.clone()));
        }
        let names = names.iter().map(|name| san(name)).collect::<Result<_, _>>()?;
        self.sign(
            request,
            Role::Controller,
            names,
            &[ExtendedKeyUsagePurpose::ServerAuth],
            now,
        )
    }

    fn sign(
        &self,
        request: &[u8],
        role: Role,
        mut names: Vec<SanType>,
        usages: &[ExtendedKeyUsagePurpose],
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, IssueError> {
        if request.len() > REQUEST_BYTES_MAX {
            return Err(IssueError::Request);
        }
        // Checks the signature, thus that the asker has the key.
        let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request))
            .map_err(|_| IssueError::Request)?;
        let key = request.public_key;
        // An uncompressed P-256 point is 4, x, y (SEC 1, 2.3.3).
        let uncompressed_p256 = key.der_bytes().len() == 65 && key.der_bytes()[0] == 4;
        if key.algorithm() != &PKCS_ECDSA_P256_SHA256 || !uncompressed_p256 {
            return Err(IssueError::KeyKind);
        }
        names.push(SanType::URI(Ia5String::try_from(role.uri(self.certificate.cluster()))?));
        let mut params = params_from(now, NODE_VALIDITY)?;
        params.distinguished_name = common_name(format!("Godwit: {role}"));
        params.subject_alt_names = names;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages.to_vec();
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(&key, &self.issuer)?.der().clone())
    }

    /// What a join token pins.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.certificate.fingerprint()
    }
}

impl std::fmt::Debug for ClusterAuthority {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "ClusterAuthority({:?})", self.certificate)
    }
}

/// Whether `certificate` holds the public half of `key`.
pub(crate) fn same_key(certificate: &CertificateDer<'_>, key: &KeyPair) -> bool {
    use x509_parser::prelude::FromDer as _;
    x509_parser::certificate::X509Certificate::from_der(certificate)
        .is_ok_and(|(_, certificate)| certificate.public_key().raw == key.subject_public_key_info())
}

fn params_from(now: SystemTime, validity: Duration) -> Result<CertificateParams, RandomUnavailable> {
    let mut params = CertificateParams::default();
    params.not_before = OffsetDateTime::from(now - BACKDATED);
    params.not_after = OffsetDateTime::from(now + validity);
    let mut serial: [u8; 16] = random()?;
    // Positive and of constant length (RFC 5280, 4.1.2.2).
    serial[0] = serial[0] & 0x3f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

fn common_name(name: String) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    subject
}

fn san(name: &str) -> Result<SanType, IssueError> {
    let wrong = || IssueError::Name(name.to_owned());
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    rustls::pki_types::DnsName::try_from(name).map_err(|_| wrong())?;
    Ok(SanType::DnsName(Ia5String::try_from(name).map_err(|_| wrong())?))
}
