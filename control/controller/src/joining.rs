//! How hosts come into the cell: join tokens, signing requests, certificates; and the certificates of the controller itself.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use identity::{ClusterAuthority, JoinRecord, JoinToken, NodeIdentity, NodeKey, RedeemError, Role};
use model::{Actor, Command, HostId, Millis, Refusal, Timestamp, TokenId, access, refusal::Code};
use rustls::{
    ServerConfig,
    pki_types::{CertificateSigningRequestDer, pem::PemObject as _},
};
use thiserror::Error;
use tokio::sync::watch;
use uuid::Uuid;
use wire::{JoinRequest, JoinResponse, join::BODY_BYTES_MAX};

use crate::handle::{Handle, SubmitOptions};

/// How often the controller's own certificates are made anew. They last 90 days.
const RENEW_EVERY: Duration = Duration::from_secs(24 * 3600);

/// Why a port has no certificate.
#[derive(Debug, Error)]
pub enum CertificateError {
    /// No key, or one that cannot be used.
    #[error(transparent)]
    Node(#[from] identity::NodeError),
    /// The authority did not sign; mostly a name that is none.
    #[error(transparent)]
    Issue(#[from] identity::IssueError),
    /// The TLS library refused it.
    #[error(transparent)]
    Tls(#[from] identity::tls::TlsError),
}

/// The cluster's authority, and where hosts are told to go.
#[derive(Debug)]
pub(crate) struct Authority {
    pub(crate) cluster: ClusterAuthority,
    /// `HOST:PORT` of the agents' port, as hosts reach it.
    pub(crate) agent_endpoint: String,
    /// `HOST:PORT` of the interface, as others reach it.
    pub(crate) api_endpoint: String,
}

impl Authority {
    /// A host's certificate, PEM, for the key in its signing request. Its signature proves that the asker has the key.
    pub(crate) fn certify(&self, csr_pem: &str, host: HostId) -> Result<String, Refusal> {
        let wrong = |why: String| Refusal::new(Code::InvalidInput, format!("the signing request is refused: {why}"));
        if csr_pem.len() > BODY_BYTES_MAX {
            return Err(wrong(format!("it is longer than {BODY_BYTES_MAX} bytes")));
        }
        let request = CertificateSigningRequestDer::from_pem_slice(csr_pem.as_bytes())
            .map_err(|_| wrong("it is not a PKCS #10 request in PEM".to_owned()))?;
        let certificate = self
            .cluster
            .issue(&request, Role::Host(host.0), SystemTime::now())
            .map_err(|error| wrong(error.to_string()))?;
        Ok(identity::pem("CERTIFICATE", &certificate))
    }
}

/// The configurations of both ports.
pub(crate) struct Ports {
    pub(crate) api: watch::Receiver<Arc<ServerConfig>>,
    pub(crate) agents: watch::Receiver<Arc<ServerConfig>>,
}

/// Makes the controller's certificates, and keeps making them anew while somebody listens. Their keys are never stored.
pub(crate) fn certificates(authority: &Arc<Authority>, names: &[String]) -> Result<Ports, CertificateError> {
    let (api, agents) = issue(&authority.cluster, names)?;
    let (api_writer, api) = watch::channel(api);
    let (agents_writer, agents) = watch::channel(agents);
    let (authority, names) = (authority.clone(), names.to_vec());
    tokio::spawn(async move {
        let mut every = tokio::time::interval(RENEW_EVERY);
        every.tick().await;
        loop {
            tokio::select! {
                _ = every.tick() => {}
                () = api_writer.closed() => return,
            }
            match issue(&authority.cluster, &names) {
                Ok((api, agents)) => {
                    api_writer.send_replace(api);
                    agents_writer.send_replace(agents);
                }
                Err(error) => tracing::error!(%error, "the controller's certificates were not renewed; trying again"),
            }
        }
    });
    Ok(Ports { api, agents })
}

type Configurations = (Arc<ServerConfig>, Arc<ServerConfig>);

fn issue(authority: &ClusterAuthority, names: &[String]) -> Result<Configurations, CertificateError> {
    let now = SystemTime::now();
    let key = NodeKey::generate()?;
    let certificate = authority.issue_api(&key.request()?, names, now)?;
    let api = NodeIdentity::new(key, certificate.to_vec(), authority.certificate().clone())?;
    let key = NodeKey::generate()?;
    let certificate = authority.issue(&key.request()?, Role::Controller, now)?;
    let agents = NodeIdentity::new(key, certificate.to_vec(), authority.certificate().clone())?;
    Ok((
        Arc::new(identity::tls::api_port(&api)?),
        Arc::new(identity::tls::agents_port(&agents)?),
    ))
}

impl Handle {
    /// Makes a join token and returns its text, which is shown once and kept nowhere.
    ///
    /// # Errors
    /// When the actor may not, or nothing can be stored.
    pub async fn add_join_token(&self, actor: Actor, ttl: Millis) -> Result<String, Refusal> {
        let now = self.now();
        let token = JoinToken::generate(Uuid::now_v7(), self.authority().cluster.fingerprint())
            .map_err(|error| Refusal::new(Code::Other, error.to_string()))?;
        let expires_at = now.after(ttl);
        let record = token.record(unsigned(expires_at));
        let stored = access::JoinToken {
            id: TokenId(record.id),
            hash: access::TokenHash(record.secret_sha256),
            expires_at,
            created_by: actor.subject.clone(),
        };
        self.submit(actor, Command::AddJoinToken(stored), SubmitOptions::default())
            .await?;
        Ok(token.reveal())
    }

    /// Lets a host join: its token is checked, its key certified, and both recorded in one transaction that uses the token up.
    ///
    /// # Errors
    /// `Unauthenticated` for a token that is wrong, used or too old, without saying which; `InvalidInput` for a signing request
    /// that is not by the key in it.
    pub async fn join(&self, request: JoinRequest) -> Result<JoinResponse, Refusal> {
        let token: JoinToken = request
            .token
            .expose()
            .parse()
            .map_err(|error: identity::JoinTokenError| unauthenticated(&error))?;
        let id = TokenId(token.id());
        let (stored, now) = self.ask(move |world, now| (world.join_token(id).cloned(), now)).await?;
        let stored = stored.ok_or_else(|| unauthenticated(&RedeemError::Unknown))?;
        let mut record = JoinRecord {
            id: token.id(),
            secret_sha256: stored.hash.0,
            expires_unix_ms: unsigned(stored.expires_at),
            used_by: None,
        };
        // Who it is used by is not kept: the transaction below deletes the token.
        record
            .redeem(token.secret(), request.csr_pem.as_bytes(), unsigned(now))
            .map_err(|error| unauthenticated(&error))?;
        let host = HostId(Uuid::now_v7());
        let authority = self.authority();
        let certificate_pem = authority.certify(&request.csr_pem, host)?;
        let command = Command::JoinHost {
            token: id,
            host,
            name: request.name,
        };
        self.submit(self.own_actor().await?, command, SubmitOptions::default())
            .await?;
        let name = self
            .ask(move |world, _| world.host(host).map(|row| row.name.clone()))
            .await?;
        Ok(JoinResponse {
            host,
            name,
            certificate_pem,
            ca_pem: authority.cluster.certificate().to_pem(),
            agent_endpoint: authority.agent_endpoint.clone(),
            cluster: authority.cluster.certificate().cluster(),
        })
    }
}

fn unauthenticated(error: &dyn std::error::Error) -> Refusal {
    Refusal::new(Code::Unauthenticated, error.to_string()).hint("make a new one: `godwit host add-token`")
}

fn unsigned(at: Timestamp) -> u64 {
    u64::try_from(at.0).unwrap_or(0)
}
