//! Joining a cell: a key made here, a token, a certificate; and renewing that certificate before it ends.

use std::{sync::Arc, time::SystemTime};

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Request, client::conn::http1};
use hyper_util::rt::TokioIo;
use identity::{CaCertificate, JoinTarget, NodeIdentity, NodeKey, tls};
use model::Name;
use tokio::{net::TcpStream, time::timeout};
use wire::{
    JoinRequest, JoinResponse, Problem, RenewRequest, RenewResponse, Ticket,
    join::{BODY_BYTES_MAX, JOIN_PATH},
    session::RENEW_PATH,
};

use crate::{
    config::{AgentConfig, Membership, StateError},
    leave::{Former, LeaveError},
    shared::Shared,
    template::chain,
};

const ANSWER_MAX: std::time::Duration = std::time::Duration::from_secs(20);

/// Why this host did not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The controller cannot be reached.
    #[error("cannot reach the controller at {address}; check the address, and that its port is open from here")]
    Connect {
        /// Where it was looked for.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// It is not the controller that made the token.
    #[error(
        "what answers at {address} is not the controller that made this token; check the address, or get a new token"
    )]
    NotTheController {
        /// Where it was looked for.
        address: String,
        /// Why.
        source: tls::TlsError,
    },
    /// It did not answer as it should.
    #[error("the controller at {address} did not answer as it should: {why}")]
    Answer {
        /// Where it is.
        address: String,
        /// Why.
        why: String,
    },
    /// It said no.
    #[error("the controller refused: {0}")]
    Refused(model::Refusal),
    /// No key could be made.
    #[error("no key for this host could be made")]
    Key(#[from] identity::NodeError),
    /// What was given could not be kept.
    #[error(transparent)]
    State(#[from] StateError),
    /// This host was removed from a cell, and its former membership cannot be given up.
    #[error(transparent)]
    Leave(#[from] LeaveError),
}

/// Joins a cell. The answer is kept in the state directory; when that fails, or the answer is lost, the same token may be used again
/// with another key only if it was not used up. Of a host that had joined before, and was removed, the former membership is given up
/// with all that it held; the caller has made sure of that by [`standing`](crate::standing).
///
/// # Errors
/// [`JoinError`].
pub async fn join(config: &AgentConfig, target: &JoinTarget, name: &Name) -> Result<Membership, JoinError> {
    config.make_state_dir()?;
    let former = match config.membership() {
        Ok((membership, _)) => Some(Former::of(config, &membership).await?),
        Err(StateError::NotJoined) => None,
        Err(error) => return Err(error.into()),
    };
    // An IPv6 literal in brackets: this is the request's `Host` too.
    let address = target.address.to_string();
    let key = NodeKey::generate()?;
    let request = JoinRequest {
        token: Ticket::new(target.token.reveal()),
        csr_pem: pem("CERTIFICATE REQUEST", &key.request()?),
        name: name.clone(),
    };
    let answer = ask(&address, target, &request).await?;
    let wrong = |why: String| JoinError::Answer {
        address: address.clone(),
        why,
    };
    let authority = CaCertificate::from_pem(answer.ca_pem.as_bytes()).map_err(|error| wrong(chain(&error)))?;
    if authority.fingerprint() != target.token.authority() {
        return Err(wrong("its authority is not the token's".to_owned()));
    }
    let identity = NodeIdentity::new(key, unpem(&answer.certificate_pem).map_err(wrong)?, authority)?;
    let controller = reachable(&answer.agent_endpoint, &target.address.host);
    let membership = Membership {
        version: 1,
        host: answer.host,
        name: answer.name,
        cluster: answer.cluster,
        controller,
    };
    if let Some(former) = former {
        former.forget(config)?;
    }
    config.keep(&membership, &identity)?;
    Ok(membership)
}

/// Where this host reaches the controller's port for agents: at the address by which it was reached for joining, when the
/// controller names only a port.
fn reachable(endpoint: &str, dialled: &str) -> String {
    match endpoint.rsplit_once(':') {
        Some(("" | "0.0.0.0" | "[::]", port)) if dialled.contains(':') => format!("[{dialled}]:{port}"),
        Some(("" | "0.0.0.0" | "[::]", port)) => format!("{dialled}:{port}"),
        _ => endpoint.to_owned(),
    }
}

async fn ask(address: &str, target: &JoinTarget, request: &JoinRequest) -> Result<JoinResponse, JoinError> {
    let unreachable = |source| JoinError::Connect {
        address: address.to_owned(),
        source,
    };
    let wrong = |why: String| JoinError::Answer {
        address: address.to_owned(),
        why,
    };
    let stream = timeout(ANSWER_MAX, TcpStream::connect(address))
        .await
        .map_err(|_| unreachable(std::io::ErrorKind::TimedOut.into()))?
        .map_err(unreachable)?;
    let not_it = |source| JoinError::NotTheController {
        address: address.to_owned(),
        source,
    };
    let mut tls_config = tls::joining(target.token.authority()).map_err(not_it)?;
    tls_config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let stream = tls::connect(&Arc::new(tls_config), tls::unnamed(), stream, ANSWER_MAX)
        .await
        .map_err(not_it)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| wrong(error.to_string()))?;
    let driver = tokio::spawn(connection);
    let body = serde_json::to_vec(request).map_err(|error| wrong(error.to_string()))?;
    let http = Request::post(JOIN_PATH)
        .header("host", address)
        .header("content-type", "application/json")
        .body(Full::new(bytes::Bytes::from(body)))
        .map_err(|error| wrong(error.to_string()))?;
    let answer = timeout(ANSWER_MAX, sender.send_request(http))
        .await
        .map_err(|_| wrong("no answer".to_owned()))?;
    let answer = answer.map_err(|error| wrong(error.to_string()))?;
    let status = answer.status();
    let bytes = Limited::new(answer.into_body(), BODY_BYTES_MAX)
        .collect()
        .await
        .map_err(|error| wrong(error.to_string()))?;
    driver.abort();
    let bytes = bytes.to_bytes();
    if !status.is_success() {
        return Err(match serde_json::from_slice::<Problem>(&bytes) {
            Ok(problem) => JoinError::Refused(problem.into_refusal()),
            Err(_) => wrong(format!("status {status}")),
        });
    }
    serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))
}

/// Renews this host's certificate in time, for as long as the agent lives.
pub(crate) async fn keep_fresh(shared: Arc<Shared>) {
    loop {
        let due = shared.identity().renewal_due(SystemTime::now());
        // At least a minute between tries, also when it is long overdue.
        tokio::time::sleep(due.max(std::time::Duration::from_secs(60))).await;
        match renew(&shared).await {
            Ok(()) => tracing::info!("this host's certificate was renewed"),
            Err(why) => tracing::warn!(why, "this host's certificate was not renewed; it will be tried again"),
        }
    }
}

async fn renew(shared: &Arc<Shared>) -> Result<(), String> {
    let mut link = shared.link().ok_or("the controller is not connected")?;
    let key = NodeKey::generate().map_err(|error| chain(&error))?;
    let csr = key.request().map_err(|error| chain(&error))?;
    let body = serde_json::to_vec(&RenewRequest {
        csr_pem: pem("CERTIFICATE REQUEST", &csr),
    })
    .map_err(|e| e.to_string())?;
    let request = Request::post(RENEW_PATH)
        .body(Full::new(bytes::Bytes::from(body)).boxed())
        .map_err(|e| e.to_string())?;
    let answer = timeout(ANSWER_MAX, link.send_request(request))
        .await
        .map_err(|_| "no answer")?
        .map_err(|e| e.to_string())?;
    if !answer.status().is_success() {
        return Err(format!("the controller answered {}", answer.status()));
    }
    let bytes = Limited::new(answer.into_body(), BODY_BYTES_MAX)
        .collect()
        .await
        .map_err(|e| e.to_string())?
        .to_bytes();
    let renewed: RenewResponse = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
    let authority = shared.identity().authority().clone();
    let identity =
        NodeIdentity::new(key, unpem(&renewed.certificate_pem)?, authority).map_err(|error| chain(&error))?;
    identity
        .save(&shared.config.identity_path())
        .map_err(|error| chain(&error))?;
    shared.set_identity(identity);
    Ok(())
}

/// RFC 7468 text of DER bytes.
fn pem(label: &str, der: &[u8]) -> String {
    identity::pem(label, der)
}

fn unpem(text: &str) -> Result<Vec<u8>, String> {
    use rustls::pki_types::pem::PemObject as _;
    let certificate = rustls::pki_types::CertificateDer::from_pem_slice(text.as_bytes());
    certificate.map(|der| der.to_vec()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controller_that_names_only_a_port_is_reached_where_it_was_reached_before() {
        assert_eq!(reachable("0.0.0.0:8442", "10.0.0.1"), "10.0.0.1:8442");
        assert_eq!(reachable("[::]:8442", "fd00::1"), "[fd00::1]:8442");
        assert_eq!(reachable("ctl.example:8442", "10.0.0.1"), "ctl.example:8442");
    }

    #[tokio::test]
    async fn a_controller_is_named_by_an_ipv6_literal_in_brackets() {
        let dir = tempfile::tempdir().unwrap();
        let config = crate::fixture::config(dir.path());
        let authority = crate::fixture::Cell::new().fingerprint();
        let token = identity::JoinToken::generate(uuid::Uuid::from_u128(5), authority).unwrap();
        // Nobody listens there.
        let free = std::net::TcpListener::bind("[::1]:0").unwrap().local_addr().unwrap();
        let target: JoinTarget = format!("{}@{free}", token.reveal()).parse().unwrap();
        match join(&config, &target, &"h1".parse().unwrap()).await {
            Err(JoinError::Connect { address, .. }) => assert_eq!(address, free.to_string()),
            other => panic!("{other:?}"),
        }
        let named: hyper::http::uri::Authority = target.address.to_string().parse().unwrap();
        assert_eq!(named.port_u16(), Some(free.port()));
    }
}
