//! A controller in a directory, with a store that can be made to fail or wait, and agents that speak the real protocol over real TLS.
#![allow(dead_code, reason = "each test file uses its part")]

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use controller::{Config, Controller, DefaultNetwork, Handle, Memory, StateDir, Storage, StorageError, Stored, Waited};
use futures_util::{StreamExt as _, stream};
use http_body_util::{BodyExt, Empty, StreamBody, combinators::BoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Frame, Incoming},
    client::conn::http2::SendRequest,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use identity::{ApiToken, CaCertificate, NodeIdentity, NodeKey};
use model::{
    Actor, AuditEntry, BootId, Change, HostFacts, HostId, Millis, Operation, OperationId, ProjectId, Report, Sequence,
    audit::AuditFilter,
    change::Answer,
    host::{Accelerator, Hypervisor, PoolFacts},
    layout::Family,
    query::{Listing, Page},
};
use tokio::{
    net::TcpStream,
    sync::{Semaphore, mpsc, watch},
};
use uuid::Uuid;
use wire::{
    Accepted, Decoder, Down, Hello, JoinRequest, JoinResponse, Problem, Ticket, Up,
    session::{FRAME_BYTES_MAX, SESSION_PATH},
};

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What the next commits do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// The next commit is refused, once.
    Refuse,
    /// Nothing can be written until this is changed.
    Full,
    Deposed,
}

/// Memory that fails and waits on command.
pub(crate) struct Faulty {
    pub(crate) memory: Memory,
    pub(crate) fault: Mutex<Fault>,
    /// A commit takes one permit; none are there while commits are held.
    gate: Semaphore,
    /// Commits that were begun.
    begun: watch::Sender<usize>,
}

const OPEN: usize = 1 << 20;

impl Faulty {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            memory: Memory::default(),
            fault: Mutex::new(Fault::None),
            gate: Semaphore::new(OPEN),
            begun: watch::channel(0).0,
        })
    }

    pub(crate) fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    /// Commits wait from now on. Returns a watch of those that are begun.
    pub(crate) fn hold(&self) -> watch::Receiver<usize> {
        self.gate.forget_permits(OPEN);
        let mut begun = self.begun.subscribe();
        begun.mark_unchanged();
        begun
    }

    pub(crate) fn let_go(&self) {
        self.gate.add_permits(OPEN);
    }

    fn failing() -> StorageError {
        StorageError::Failing("the disk is full".into())
    }
}

impl Storage for Faulty {
    fn load(&self) -> Waited<'_, Stored> {
        self.memory.load()
    }

    fn recover(&self) -> Waited<'_, Stored> {
        Box::pin(async move {
            match *self.fault.lock().unwrap() {
                Fault::Full => return Err(Self::failing()),
                Fault::Deposed => return Err(StorageError::Deposed),
                Fault::None | Fault::Refuse => {}
            }
            self.memory.load().await
        })
    }

    fn commit(&self, changes: Vec<Change>) -> Waited<'_, ()> {
        Box::pin(async move {
            self.begun.send_modify(|count| *count += 1);
            self.gate.acquire().await.unwrap().forget();
            {
                let mut fault = self.fault.lock().unwrap();
                match *fault {
                    Fault::None => {}
                    Fault::Refuse => {
                        *fault = Fault::None;
                        return Err(StorageError::Refused("a name twice".into()));
                    }
                    Fault::Full => return Err(Self::failing()),
                    Fault::Deposed => return Err(StorageError::Deposed),
                }
            }
            self.memory.commit(changes).await
        })
    }

    fn answer(&self, project: ProjectId, key: String) -> Waited<'_, Option<Answer>> {
        self.memory.answer(project, key)
    }

    fn operation(&self, id: OperationId) -> Waited<'_, Option<Operation>> {
        self.memory.operation(id)
    }

    fn operations(&self, project: Option<ProjectId>, page: Page) -> Waited<'_, Listing<Operation>> {
        self.memory.operations(project, page)
    }

    fn audit(&self, filter: AuditFilter, page: Page) -> Waited<'_, Listing<AuditEntry>> {
        self.memory.audit(filter, page)
    }
}

/// A cell: its directory and store outlive its controller.
pub(crate) struct Cell {
    directory: tempfile::TempDir,
    pub(crate) storage: Arc<Faulty>,
    pub(crate) controller: Option<Controller>,
    pub(crate) handle: Handle,
}

pub(crate) fn config(directory: &std::path::Path) -> Config {
    let loopback: SocketAddr = "127.0.0.1:0".parse().unwrap();
    Config {
        state: directory.to_owned(),
        api_listen: loopback,
        agents_listen: loopback,
        names: vec!["127.0.0.1".to_owned()],
        network: DefaultNetwork {
            address: "10.91.0.0".parse().unwrap(),
            prefix: 24,
            gateway: Some("10.91.0.1".parse().unwrap()),
            first: "10.91.0.10".parse().unwrap(),
            last: "10.91.0.99".parse().unwrap(),
        },
        telemetry_bytes_max: Config::TELEMETRY_BYTES,
    }
}

impl Cell {
    pub(crate) async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let storage = Faulty::new();
        let (controller, handle) = Controller::start_with(config(directory.path()), storage.clone())
            .await
            .unwrap();
        Self {
            directory,
            storage,
            controller: Some(controller),
            handle,
        }
    }

    /// As on kill -9: nothing is said, nothing is flushed. The next process starts at once.
    pub(crate) async fn crash(&mut self) {
        drop(self.controller.take());
        let (controller, handle) = Controller::start_with(config(self.directory.path()), self.storage.clone())
            .await
            .unwrap();
        self.controller = Some(controller);
        self.handle = handle;
    }

    pub(crate) fn state(&self) -> StateDir {
        StateDir::new(self.directory.path())
    }

    pub(crate) fn controller(&mut self) -> &mut Controller {
        self.controller.as_mut().unwrap()
    }

    pub(crate) fn agents_address(&self) -> SocketAddr {
        self.controller.as_ref().unwrap().agents_address()
    }

    pub(crate) fn admin(&self) -> Actor {
        let token = ApiToken::read_file(&self.state().admin_token()).unwrap();
        self.handle.authenticate(&token.reveal()).unwrap()
    }

    pub(crate) async fn join_token(&self) -> String {
        self.handle
            .add_join_token(self.admin(), Millis::seconds(3600))
            .await
            .unwrap()
    }

    pub(crate) async fn join(&self, name: &str) -> Host {
        let key = NodeKey::generate().unwrap();
        let request = join_request(&self.join_token().await, &key, name);
        let response = self.handle.join(request).await.unwrap();
        Host::new(key, &response)
    }
}

pub(crate) fn join_request(token: &str, key: &NodeKey, name: &str) -> JoinRequest {
    JoinRequest {
        token: Ticket::new(token),
        csr_pem: identity::pem("CERTIFICATE REQUEST", &key.request().unwrap()),
        name: name.parse().unwrap(),
    }
}

/// A host that has joined.
pub(crate) struct Host {
    pub(crate) id: HostId,
    pub(crate) identity: NodeIdentity,
}

impl Host {
    pub(crate) fn new(key: NodeKey, response: &JoinResponse) -> Self {
        use rustls::pki_types::{CertificateDer, pem::PemObject as _};
        let certificate = CertificateDer::from_pem_slice(response.certificate_pem.as_bytes()).unwrap();
        let authority = CaCertificate::from_pem(response.ca_pem.as_bytes()).unwrap();
        Self {
            id: response.host,
            identity: NodeIdentity::new(key, certificate.to_vec(), authority).unwrap(),
        }
    }

    pub(crate) async fn connect(&self, address: SocketAddr) -> Link {
        let config = Arc::new(identity::tls::to_controller(&self.identity).unwrap());
        let stream = TcpStream::connect(address).await.unwrap();
        let stream = identity::tls::connect(&config, identity::tls::unnamed(), stream, PATIENCE)
            .await
            .unwrap();
        let (requests, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
        let connection = tokio::spawn(async move { drop(connection.await) });
        Link { requests, connection }
    }

    /// A session with nothing sent before.
    pub(crate) async fn session(&self, cell: &Cell, incarnation: Uuid) -> Session {
        let link = self.connect(cell.agents_address()).await;
        link.session(hello(incarnation, 0)).await.unwrap()
    }
}

type Body = BoxBody<Bytes, std::io::Error>;

/// A connection of an agent.
pub(crate) struct Link {
    requests: SendRequest<Body>,
    connection: tokio::task::JoinHandle<()>,
}

impl Link {
    pub(crate) async fn request(&self, request: Request<Body>) -> Response<Incoming> {
        tokio::time::timeout(PATIENCE, self.requests.clone().send_request(request))
            .await
            .unwrap()
            .unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> (StatusCode, Bytes) {
        self.ask("GET", path, None, None).await
    }

    /// A request with a header and a whole body, and its answer.
    pub(crate) async fn ask(
        &self,
        method: &str,
        path: &str,
        header: Option<(&str, &str)>,
        content: Option<&'static [u8]>,
    ) -> (StatusCode, Bytes) {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("https://controller{path}"));
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        let body = match content {
            Some(content) => {
                request = request.header("content-length", content.len());
                http_body_util::Full::from(content)
                    .map_err(|never| match never {})
                    .boxed()
            }
            None => Empty::new().map_err(|never| match never {}).boxed(),
        };
        let response = self.request(request.body(body).unwrap()).await;
        let status = response.status();
        (status, response.into_body().collect().await.unwrap().to_bytes())
    }

    /// A request whose body is sent piece by piece.
    pub(crate) async fn post(
        &self,
        path: &str,
        header: Option<(&str, &str)>,
        first: Option<Bytes>,
    ) -> (mpsc::Sender<Bytes>, Response<Incoming>) {
        let (pieces, body) = piecewise();
        if let Some(first) = first {
            pieces.send(first).await.unwrap();
        }
        let mut request = Request::post(format!("https://controller{path}"));
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        let response = self.request(request.body(body).unwrap()).await;
        (pieces, response)
    }

    /// A request with a whole body.
    pub(crate) async fn post_whole(
        &self,
        path: &str,
        header: Option<(&str, &str)>,
        body: Bytes,
    ) -> (StatusCode, Bytes) {
        let (pieces, sending) = piecewise();
        pieces.send(body).await.unwrap();
        drop(pieces);
        let mut request = Request::post(format!("https://controller{path}"));
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        let response = self.request(request.body(sending).unwrap()).await;
        let status = response.status();
        (status, response.into_body().collect().await.unwrap().to_bytes())
    }

    pub(crate) async fn session(self, hello: Hello) -> Result<Session, Problem> {
        let (up, body) = piecewise();
        up.send(wire::encode(&Up::Hello(hello), FRAME_BYTES_MAX).unwrap())
            .await
            .unwrap();
        let request = Request::post(format!("https://controller{SESSION_PATH}"))
            .body(body)
            .unwrap();
        let response = self.request(request).await;
        if !response.status().is_success() {
            let body = response.into_body().collect().await.unwrap().to_bytes();
            return Err(serde_json::from_slice(&body).unwrap());
        }
        let mut session = Session {
            link: self,
            up,
            down: response.into_body(),
            decoder: Decoder::new(FRAME_BYTES_MAX),
            accepted: None,
        };
        match session.next().await {
            Some(Down::Accepted(accepted)) => session.accepted = Some(accepted),
            other => panic!("not accepted: {other:?}"),
        }
        Ok(session)
    }
}

fn piecewise() -> (mpsc::Sender<Bytes>, Body) {
    let (pieces, end) = mpsc::channel::<Bytes>(64);
    let frames = stream::unfold(end, |mut end| async move { end.recv().await.map(|piece| (piece, end)) });
    let body = StreamBody::new(frames.map(|piece| Ok::<_, std::io::Error>(Frame::data(piece))));
    (pieces, BodyExt::boxed(body))
}

pub(crate) fn hello(incarnation: Uuid, acknowledged: u64) -> Hello {
    Hello {
        version_min: 1,
        version_max: 1,
        build: "test".to_owned(),
        incarnation,
        acknowledged: Sequence(acknowledged),
        epoch: model::Epoch(0),
    }
}

/// A live session of an agent.
pub(crate) struct Session {
    pub(crate) link: Link,
    pub(crate) up: mpsc::Sender<Bytes>,
    down: Incoming,
    decoder: Decoder,
    accepted: Option<Accepted>,
}

impl Session {
    pub(crate) fn accepted(&self) -> &Accepted {
        self.accepted.as_ref().unwrap()
    }

    pub(crate) async fn send(&self, up: &Up) {
        self.up.send(wire::encode(up, FRAME_BYTES_MAX).unwrap()).await.unwrap();
    }

    pub(crate) async fn report(&self, sequence: u64, report: Report) {
        let sequence = Sequence(sequence);
        self.send(&Up::Report { sequence, report }).await;
    }

    /// The next frame that is no heartbeat; `None` at the end.
    pub(crate) async fn next(&mut self) -> Option<Down> {
        let next = async {
            loop {
                match self.decoder.next_message().unwrap() {
                    Some(Down::Heartbeat) => {}
                    Some(down) => return Some(down),
                    None => {
                        let frame = self.down.frame().await?.ok()?;
                        self.decoder.push(&frame.into_data().ok()?);
                    }
                }
            }
        };
        tokio::time::timeout(PATIENCE, next).await.unwrap()
    }

    pub(crate) async fn acknowledged(&mut self, wanted: u64) {
        loop {
            match self.next().await {
                Some(Down::Ack { sequence }) if sequence.0 >= wanted => return assert_eq!(sequence.0, wanted),
                Some(Down::Ack { .. } | Down::Order { .. }) => {}
                other => panic!("no acknowledgement of {wanted}, but {other:?}"),
            }
        }
    }

    pub(crate) async fn order(&mut self) -> model::Order {
        loop {
            match self.next().await {
                Some(Down::Order { order }) => return order,
                Some(Down::Ack { .. }) => {}
                other => panic!("no order, but {other:?}"),
            }
        }
    }

    /// As when the machine is switched off.
    pub(crate) fn cut(self) {
        self.link.connection.abort();
    }
}

pub(crate) fn facts(boot: u128, pool: u128) -> Report {
    let hypervisor = Hypervisor {
        kind: "qemu".into(),
        version: "10.0.2".into(),
        accelerator: Accelerator::Tcg,
        accelerator_reason: "/dev/kvm is not there".into(),
        machines: [(Family::Q35, "pc-q35-7.2".to_owned())].into(),
        machine_types: ["pc-q35-7.2".to_owned()].into(),
        migration: [].into(),
    };
    Report::Facts(Box::new(HostFacts {
        boot: BootId(Uuid::from_u128(boot)),
        address: "127.0.0.1".parse().unwrap(),
        peer_port: 1,
        cpus: 8,
        memory_mib: 16384,
        hypervisor,
        pools: vec![PoolFacts {
            id: Uuid::from_u128(pool).into(),
            name: "local".parse().unwrap(),
            capacity_bytes: 1 << 40,
            free_bytes: 1 << 40,
            silent_since: None,
        }],
        agent_version: "test".into(),
    }))
}
