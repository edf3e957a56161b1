//! Every link, with the right peer and with each wrong one, over real TCP on loopback.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may panic as tests do")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use identity::tls::{self, TlsError};
use identity::{CaCertificate, ClusterAuthority, Fingerprint, NodeIdentity, NodeKey, Peer, Role, WrongPeer};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ServerConfig};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(20);
const A: Uuid = Uuid::from_u128(0xa);
const B: Uuid = Uuid::from_u128(0xb);
const DAYS: Duration = Duration::from_secs(24 * 3600);

struct Cluster {
    authority: ClusterAuthority,
    _state: TempDir,
}

impl Cluster {
    fn new(id: u128) -> Self {
        let state = tempfile::tempdir().unwrap();
        let authority = ClusterAuthority::create(state.path(), Uuid::from_u128(id), SystemTime::now()).unwrap();
        Self {
            authority,
            _state: state,
        }
    }

    fn node_at(&self, role: Role, now: SystemTime) -> NodeIdentity {
        let key = NodeKey::generate().unwrap();
        let certificate = self.authority.issue(&key.request().unwrap(), role, now).unwrap();
        NodeIdentity::new(key, certificate.to_vec(), self.authority.certificate().clone()).unwrap()
    }

    fn node(&self, role: Role) -> NodeIdentity {
        self.node_at(role, SystemTime::now())
    }

    fn api(&self) -> NodeIdentity {
        let key = NodeKey::generate().unwrap();
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
        let certificate = self
            .authority
            .issue_api(&key.request().unwrap(), &names, SystemTime::now())
            .unwrap();
        NodeIdentity::new(key, certificate.to_vec(), self.authority.certificate().clone()).unwrap()
    }
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// What each side saw: the server the peer's role and one byte, the client that byte's echo.
type Outcome = (Result<Option<Peer>, TlsError>, Result<u8, String>);

async fn meet(server: ServerConfig, client: ClientConfig, name: ServerName<'static>) -> Outcome {
    let (listener, address) = listen().await;
    let server = async move {
        let (socket, _) = listener.accept().await.unwrap();
        let mut stream = tls::accept(&Arc::new(server), socket, PATIENCE).await?;
        let peer = tls::peer_of(&stream).ok();
        let byte = stream.read_u8().await.map_err(TlsError::Handshake)?;
        stream.write_u8(byte).await.map_err(TlsError::Handshake)?;
        stream.shutdown().await.map_err(TlsError::Handshake)?;
        Ok(peer)
    };
    let client = async move {
        let socket = TcpStream::connect(address).await.unwrap();
        let connected = tls::connect(&Arc::new(client), name, socket, PATIENCE).await;
        let mut stream = connected.map_err(|error| format!("{error}: {:?}", std::error::Error::source(&error)))?;
        stream.write_u8(42).await.map_err(|error| error.to_string())?;
        stream.read_u8().await.map_err(|error| error.to_string())
    };
    tokio::join!(server, client)
}

async fn accepted(server: ServerConfig, client: ClientConfig) -> Peer {
    let (server, client) = meet(server, client, tls::unnamed()).await;
    assert_eq!(client, Ok(42));
    server.unwrap().unwrap()
}

async fn refused(server: ServerConfig, client: ClientConfig) -> String {
    let (server, client) = meet(server, client, tls::unnamed()).await;
    let client = client.expect_err("the client got an answer");
    format!("{:?} / {client}", server.expect_err("the server served it"))
}

#[tokio::test]
async fn the_right_peers_meet_and_know_each_other() {
    let cluster = Cluster::new(1);
    let (controller, a, b) = (
        cluster.node(Role::Controller),
        cluster.node(Role::Host(A)),
        cluster.node(Role::Host(B)),
    );
    let seen = accepted(tls::agents_port(&controller).unwrap(), tls::to_controller(&a).unwrap()).await;
    assert_eq!((seen.role, seen.cluster), (Role::Host(A), Uuid::from_u128(1)));
    assert!(seen.not_after > SystemTime::now() + 89 * DAYS);
    let seen = accepted(tls::from_host(&b, A).unwrap(), tls::to_host(&a, B).unwrap()).await;
    assert_eq!(seen.role, Role::Host(A));
}

#[tokio::test]
async fn a_wrong_role_or_host_fails_in_the_handshake_on_either_side() {
    let cluster = Cluster::new(1);
    let (controller, a, b) = (
        cluster.node(Role::Controller),
        cluster.node(Role::Host(A)),
        cluster.node(Role::Host(B)),
    );
    // Where the server is the wrong one: the client refuses.
    let why = refused(tls::agents_port(&b).unwrap(), tls::to_controller(&a).unwrap()).await;
    assert!(
        why.contains("this connection is for the controller") || why.contains("expected: Controller"),
        "{why}"
    );
    refused(tls::from_host(&b, A).unwrap(), tls::to_host(&a, A).unwrap()).await;
    refused(tls::from_host(&controller, A).unwrap(), tls::to_host(&a, B).unwrap()).await;
    // Where the client is: the server refuses.
    refused(
        tls::agents_port(&controller).unwrap(),
        tls::to_controller(&controller).unwrap(),
    )
    .await;
    let (server, client) = meet(
        tls::from_host(&b, A).unwrap(),
        tls::to_host(&b, B).unwrap(),
        tls::unnamed(),
    )
    .await;
    let wrong = WrongPeer::Role {
        expected: identity::Expect::Host(A),
        found: Role::Host(B),
    };
    assert!(client.is_err() && matches!(server, Err(TlsError::WrongPeer(found)) if found == wrong));
    refused(tls::from_host(&b, A).unwrap(), tls::to_host(&controller, B).unwrap()).await;
}

#[tokio::test]
async fn another_clusters_nodes_are_refused() {
    let (ours, theirs) = (Cluster::new(1), Cluster::new(2));
    let same_id = Cluster::new(1);
    for other in [&theirs, &same_id] {
        let (stranger, controller) = (other.node(Role::Host(A)), other.node(Role::Controller));
        refused(
            tls::agents_port(&ours.node(Role::Controller)).unwrap(),
            tls::to_controller(&stranger).unwrap(),
        )
        .await;
        refused(
            tls::agents_port(&controller).unwrap(),
            tls::to_controller(&ours.node(Role::Host(A))).unwrap(),
        )
        .await;
    }
}

#[tokio::test]
async fn an_expired_certificate_is_refused_on_either_side() {
    let cluster = Cluster::new(1);
    let long_ago = SystemTime::now() - 100 * DAYS;
    let (old, old_controller) = (
        cluster.node_at(Role::Host(A), long_ago),
        cluster.node_at(Role::Controller, long_ago),
    );
    let (host, controller) = (cluster.node(Role::Host(A)), cluster.node(Role::Controller));
    let why = refused(
        tls::agents_port(&controller).unwrap(),
        tls::to_controller(&old).unwrap(),
    )
    .await;
    assert!(why.contains("Expired"), "{why}");
    let why = refused(
        tls::agents_port(&old_controller).unwrap(),
        tls::to_controller(&host).unwrap(),
    )
    .await;
    assert!(why.contains("Expired"), "{why}");
    assert_eq!(old.renewal_due(SystemTime::now()), Duration::ZERO);
    assert!(host.renewal_due(SystemTime::now()) > 29 * DAYS);
}

fn without_certificate() -> ClientConfig {
    let mut config = tls::joining(Fingerprint([0; 32])).unwrap();
    config.dangerous().set_certificate_verifier(Arc::new(Credulous));
    config
}

/// Trusts any server, so that what is tested is the server's refusal.
#[derive(Debug)]
struct Credulous;

impl rustls::client::danger::ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        tls::provider().signature_verification_algorithms.supported_schemes()
    }
}

/// A certificate that claims to be `role` of `cluster` but is signed by its own key.
fn self_signed(cluster: Uuid, role: Role) -> ClientConfig {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![rcgen::SanType::URI(role.uri(cluster).try_into().unwrap())];
    let certificate = params.self_signed(&key).unwrap().der().clone();
    ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Credulous))
        .with_client_auth_cert(
            vec![certificate],
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )
        .unwrap()
}

#[tokio::test]
async fn no_certificate_and_a_self_signed_one_are_refused() {
    let cluster = Cluster::new(1);
    let (controller, b) = (cluster.node(Role::Controller), cluster.node(Role::Host(B)));
    let mut bare = without_certificate();
    let why = refused(tls::agents_port(&controller).unwrap(), bare.clone()).await;
    assert!(
        why.contains("NoCertificatesPresented") || why.contains("no certificates"),
        "{why}"
    );
    bare.alpn_protocols = Vec::new();
    refused(tls::from_host(&b, A).unwrap(), bare).await;
    let forged = self_signed(Uuid::from_u128(1), Role::Host(A));
    refused(tls::agents_port(&controller).unwrap(), forged.clone()).await;
    refused(tls::from_host(&b, A).unwrap(), forged).await;
}

#[tokio::test]
async fn a_joining_host_accepts_only_the_controller_of_the_token() {
    let (ours, theirs) = (Cluster::new(1), Cluster::new(2));
    let pin = || tls::joining(ours.authority.fingerprint()).unwrap();
    let (server, client) = meet(tls::api_port(&ours.api()).unwrap(), pin(), tls::unnamed()).await;
    assert_eq!((server.unwrap(), client), (None, Ok(42)));
    let why = refused(tls::api_port(&theirs.api()).unwrap(), pin()).await;
    assert!(why.contains("the token or the address is of another cluster"), "{why}");
    // A host of the same cluster that poses as the controller, sending the right authority along.
    refused(tls::api_port(&ours.node(Role::Host(A))).unwrap(), pin()).await;
}

#[tokio::test]
async fn people_reach_the_api_by_its_names_only() {
    let (ours, theirs) = (Cluster::new(1), Cluster::new(2));
    let client = |cluster: &Cluster| tls::to_api(cluster.authority.certificate()).unwrap();
    for name in ["localhost", "127.0.0.1", "::1"] {
        let name = ServerName::try_from(name).unwrap();
        let (server, answer) = meet(tls::api_port(&ours.api()).unwrap(), client(&ours), name).await;
        assert_eq!((server.unwrap(), answer), (None, Ok(42)));
    }
    let cases = [("elsewhere", &ours), ("localhost", &theirs)];
    for (name, trusted) in cases {
        let name = ServerName::try_from(name).unwrap();
        let (server, answer) = meet(tls::api_port(&ours.api()).unwrap(), client(trusted), name).await;
        assert!(server.is_err() && answer.is_err());
    }
}

#[tokio::test]
async fn an_api_certificate_cannot_dial() {
    let cluster = Cluster::new(1);
    refused(
        tls::from_host(&cluster.node(Role::Host(B)), A).unwrap(),
        tls::to_host(&cluster.api(), B).unwrap(),
    )
    .await;
}

#[tokio::test]
async fn garbage_and_silence_end_by_themselves() {
    let cluster = Cluster::new(1);
    let config = Arc::new(tls::agents_port(&cluster.node(Role::Controller)).unwrap());
    let (listener, address) = listen().await;
    let mut garbage = TcpStream::connect(address).await.unwrap();
    garbage.write_all(&[0xff; 4096]).await.unwrap();
    let (socket, _) = listener.accept().await.unwrap();
    assert!(matches!(
        tls::accept(&config, socket, PATIENCE).await,
        Err(TlsError::Handshake(_))
    ));

    let _silent = TcpStream::connect(address).await.unwrap();
    let (socket, _) = listener.accept().await.unwrap();
    let brief = Duration::from_millis(50);
    assert!(matches!(tls::accept(&config, socket, brief).await, Err(TlsError::Deadline(d)) if d == brief));

    let client = Arc::new(tls::to_controller(&cluster.node(Role::Host(A))).unwrap());
    let deaf = TcpStream::connect(address).await.unwrap();
    assert!(matches!(
        tls::connect(&client, tls::unnamed(), deaf, brief).await,
        Err(TlsError::Deadline(_))
    ));
}

#[test]
fn the_authority_is_made_once_survives_and_is_private() {
    use std::os::unix::fs::PermissionsExt as _;
    let state = tempfile::tempdir().unwrap();
    let dir = state.path().join("ca");
    let now = SystemTime::now();
    let made = ClusterAuthority::load_or_create(&dir, Uuid::from_u128(1), now).unwrap();
    assert!(ClusterAuthority::create(&dir, Uuid::from_u128(2), now).is_err());
    let loaded = ClusterAuthority::load_or_create(&dir, Uuid::from_u128(2), now).unwrap();
    assert_eq!(made.certificate(), loaded.certificate());
    let public = std::fs::read(dir.join("cluster.crt")).unwrap();
    assert_eq!(
        CaCertificate::from_pem(&public).unwrap().fingerprint(),
        loaded.fingerprint()
    );
    let key = dir.join("authority.pem");
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&dir), mode(&key)), (0o700, 0o600));
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = ClusterAuthority::load(&dir).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("chmod 600"), "{source}");
}

#[test]
fn an_issuer_takes_only_the_key_of_a_request() {
    let cluster = Cluster::new(1);
    let now = SystemTime::now();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut greedy = rcgen::CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
    greedy.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let wanted = Role::Controller.uri(Uuid::from_u128(1));
    greedy
        .subject_alt_names
        .push(rcgen::SanType::URI(wanted.clone().try_into().unwrap()));
    let request = greedy.serialize_request(&key).unwrap();
    let issued = cluster.authority.issue(request.der(), Role::Host(A), now).unwrap();
    assert_eq!(Peer::of_certificate(&issued).unwrap().role, Role::Host(A));
    assert!(CaCertificate::from_der(issued.to_vec()).is_err());
    for absent in [wanted.as_bytes(), b"evil.example"] {
        assert!(!issued.windows(absent.len()).any(|w| w == absent));
    }
}

#[test]
fn requests_without_proof_of_possession_or_of_another_kind_are_refused() {
    let cluster = Cluster::new(1);
    let now = SystemTime::now();
    let issue = |request: &[u8]| cluster.authority.issue(request, Role::Host(A), now);
    let good = NodeKey::generate().unwrap().request().unwrap();
    assert!(issue(&good).is_ok());
    // A flipped bit in the signature, at the end, and in the key.
    for at in [good.len() - 1, good.len() / 2] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        assert!(issue(&bad).is_err());
    }
    for cut in 0..good.len() {
        assert!(issue(&good[..cut]).is_err());
    }
    assert!(issue(&vec![0x30; 100_000]).is_err());
    for kind in [&rcgen::PKCS_ED25519, &rcgen::PKCS_ECDSA_P384_SHA384] {
        let key = rcgen::KeyPair::generate_for(kind).unwrap();
        let request = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
        assert!(matches!(issue(request.der()), Err(identity::IssueError::KeyKind)));
    }
    let names = |names: &[&str]| {
        let names: Vec<_> = names.iter().map(|n| (*n).to_owned()).collect();
        cluster.authority.issue_api(&good, &names, now)
    };
    assert!(names(&["h1", "10.0.0.1", "::1"]).is_ok());
    for bad in ["", "a b", "x\0y", "-", "a..b"] {
        assert!(matches!(names(&[bad]), Err(identity::IssueError::Name(_))), "{bad}");
    }
    assert!(names(&["h"; 65]).is_err());
}

#[test]
fn a_node_keeps_only_an_identity_that_fits_together() {
    let (ours, theirs) = (Cluster::new(1), Cluster::new(1));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("node.pem");
    let node = ours.node(Role::Host(A));
    node.save(&path).unwrap();
    let back = NodeIdentity::load(&path).unwrap();
    assert_eq!((back.peer(), back.certificate()), (node.peer(), node.certificate()));
    assert!(format!("{back:?}").contains(&A.to_string()));

    let ca = || ours.authority.certificate().clone();
    let (one, two) = (NodeKey::generate().unwrap(), NodeKey::generate().unwrap());
    let certificate = ours
        .authority
        .issue(&one.request().unwrap(), Role::Host(A), SystemTime::now())
        .unwrap()
        .to_vec();
    assert!(matches!(
        NodeIdentity::new(two, certificate.clone(), ca()),
        Err(identity::NodeError::Key)
    ));
    let other = theirs.authority.certificate().clone();
    assert!(matches!(
        NodeIdentity::new(one, certificate, other),
        Err(identity::NodeError::Issuer)
    ));
    let authority_as_node = ours.authority.certificate().der().to_vec();
    assert!(NodeIdentity::new(NodeKey::generate().unwrap(), authority_as_node, ca()).is_err());

    let whole = std::fs::read(&path).unwrap();
    for cut in (0..whole.len() - 2).step_by(37) {
        identity::secret_file::replace(&path, &whole[..cut]).unwrap();
        assert!(NodeIdentity::load(&path).is_err(), "{cut}");
    }
}

#[tokio::test]
async fn later_connections_of_a_migration_resume_and_keep_the_peers_identity() {
    let cluster = Cluster::new(1);
    let server = Arc::new(tls::from_host(&cluster.node(Role::Host(B)), A).unwrap());
    let client = Arc::new(tls::to_host(&cluster.node(Role::Host(A)), B).unwrap());
    let (listener, address) = listen().await;
    for round in 0..3 {
        let serve = async {
            let (socket, _) = listener.accept().await.unwrap();
            let mut stream = tls::accept(&server, socket, PATIENCE).await.unwrap();
            assert_eq!(tls::peer_of(&stream).unwrap().role, Role::Host(A));
            let byte = stream.read_u8().await.unwrap();
            stream.write_u8(byte).await.unwrap();
            stream.get_ref().1.handshake_kind()
        };
        let dial = async {
            let socket = TcpStream::connect(address).await.unwrap();
            let mut stream = tls::connect(&client, tls::unnamed(), socket, PATIENCE).await.unwrap();
            stream.write_u8(1).await.unwrap();
            stream.read_u8().await.unwrap();
        };
        let (kind, ()) = tokio::join!(serve, dial);
        let resumed = kind == Some(rustls::HandshakeKind::Resumed);
        assert_eq!(resumed, round > 0, "{kind:?} in round {round}");
    }
}

#[test]
fn a_wrong_peer_is_named_in_the_message() {
    let wrong = WrongPeer::Role {
        expected: identity::Expect::Host(B),
        found: Role::Controller,
    };
    assert_eq!(
        wrong.to_string(),
        format!("the peer is the controller, but this connection is for host {B}")
    );
}
