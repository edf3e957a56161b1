//! From a configuration to a running controller: state directory, authority, store, loop, ports.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::Router;
use engine::{Bootstrap, World};
use identity::{Address, ApiToken, ClusterAuthority, secret_file};
use model::{NetworkId, ProjectId, SubnetId};
use rustls::ServerConfig;
use store::Store;
use thiserror::Error;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinHandle,
};
use uuid::Uuid;

use crate::{
    agents::{self, Agents},
    blobs::{Blobs, UNNAMED_KEPT},
    clock::Clock,
    committed::Committed,
    config::{ClientFile, Config, DefaultNetwork, StateDir},
    consoles::Consoles,
    core::{Core, Ended, Health, INPUTS_MAX, Parts, is_first_start},
    handle::{Handle, Shared, token_hash, token_id},
    joining::{Authority, CertificateError, certificates},
    metrics::Metrics,
    passwords::Passwords,
    serve::Port,
    storage::{Storage, StorageError, Stored, with_notices},
    telemetry,
};

/// Connections of people and tools at a time.
const API_CONNECTIONS_MAX: usize = 1024;

/// Connections of agents at a time; each has one, and a second while it reconnects.
const AGENTS_CONNECTIONS_MAX: usize = 4096;

/// Largest packet on the network `default`, bytes.
const MTU: u16 = 1500;

/// Why the controller did not start. Nothing of it runs then.
#[derive(Debug, Error)]
pub enum StartError {
    /// The configuration cannot be.
    #[error("the configuration is refused: {0}")]
    Config(String),
    /// A file or directory of the state cannot be used.
    #[error("cannot use {}; check its owner, its permissions and the space left", path.display())]
    State {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file with a secret cannot be used.
    #[error(transparent)]
    Secret(#[from] secret_file::WriteSecretError),
    /// The first administrator's token cannot be used.
    #[error(transparent)]
    Token(#[from] identity::ApiTokenError),
    /// The cluster's authority cannot be used.
    #[error(transparent)]
    Authority(#[from] identity::AuthorityError),
    /// No certificate could be made.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// The operating system gave no randomness.
    #[error(transparent)]
    Random(#[from] identity::RandomUnavailable),
    /// The store did not open.
    #[error(transparent)]
    Open(#[from] store::OpenError),
    /// The store was opened and cannot be used.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// What is stored is no world.
    #[error(transparent)]
    World(#[from] engine::LoadError),
    /// A port cannot be listened on.
    #[error("cannot listen on {address}; is another process there?")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A running controller. Dropped, it stops as on a crash; [`Controller::stop`] lets requests under way end.
#[derive(Debug)]
pub struct Controller {
    api: Option<TcpListener>,
    api_address: SocketAddr,
    agents_address: SocketAddr,
    tls: watch::Receiver<Arc<ServerConfig>>,
    metrics: Arc<Metrics>,
    /// Ends the loop and the agents' port.
    stop: watch::Sender<bool>,
    /// Ends the interface's port, before that.
    stop_api: watch::Sender<bool>,
    core: JoinHandle<Ended>,
    api_server: Option<JoinHandle<()>>,
    agents_server: JoinHandle<()>,
    sweeper: JoinHandle<()>,
}

impl Controller {
    /// Starts with the embedded store.
    ///
    /// # Errors
    /// [`StartError`], which says what to do.
    pub async fn start(config: Config) -> Result<(Self, Handle), StartError> {
        let state = StateDir::new(&config.state);
        secret_file::private_directory(&state.root())?;
        let (store, loaded) = Store::open(&state.store()).await?;
        let stored = with_notices(&store, loaded).await?;
        Self::begin(config, Arc::new(store), stored).await
    }

    /// Starts with any store that is open.
    ///
    /// # Errors
    /// [`StartError`], which says what to do.
    pub async fn start_with(config: Config, storage: Arc<dyn Storage>) -> Result<(Self, Handle), StartError> {
        let stored = storage.load().await?;
        Self::begin(config, storage, stored).await
    }

    // tidy: long because all parts of a controller are put together here.
    async fn begin(config: Config, storage: Arc<dyn Storage>, stored: Stored) -> Result<(Self, Handle), StartError> {
        let name = check(&config)?;
        let state = StateDir::new(&config.state);
        secret_file::private_directory(&state.root())?;
        let (api, api_address) = listen(config.api_listen).await?;
        let (agents_listener, agents_address) = listen(config.agents_listen).await?;
        let cluster = ClusterAuthority::load_or_create(&state.authority(), Uuid::now_v7(), SystemTime::now())?;
        let authority = Arc::new(Authority {
            cluster,
            agent_endpoint: endpoint(&name, agents_address),
            api_endpoint: endpoint(&name, api_address),
        });
        let ports = certificates(&authority, &config.names)?;
        let stored = begin_world(&*storage, stored, &config, &state).await?;
        write_client_files(&state, &authority)?;
        let blobs = in_state(state.blobs(), Blobs::open)?;

        let clock = Arc::new(Clock::start());
        let telemetry = telemetry::Store::open(&state.telemetry(), config.telemetry_bytes_max, clock.now());
        let metrics = Arc::new(Metrics::new(telemetry.figures()));
        let committed = Arc::new(Committed::new(metrics.clone()));
        let (inputs, inputs_end) = mpsc::channel(INPUTS_MAX);
        let (stop, stopped) = watch::channel(false);
        let (health, health_end) = watch::channel(Health::default());
        let shared = Shared {
            inputs,
            committed: committed.clone(),
            metrics: metrics.clone(),
            blobs,
            consoles: Arc::new(Consoles::default()),
            authority,
            storage: storage.clone(),
            health: health_end,
            clock,
            passwords: Passwords::default(),
            telemetry: Arc::new(telemetry),
            meters: Arc::default(),
        };
        let parts = Parts {
            storage,
            committed,
            metrics: metrics.clone(),
            inputs: inputs_end,
            stop: stopped.clone(),
            health,
            clock: shared.clock.clone(),
        };
        let core = Core::load(parts, stored).await?;
        let port = Port {
            listener: agents_listener,
            tls: ports.agents,
            router: agents::router(Agents::of(&shared)),
            hosts_only: true,
            connections_max: AGENTS_CONNECTIONS_MAX,
            metrics: metrics.clone(),
            stop: stopped,
        };
        let sweeping = sweep(shared.blobs.clone(), shared.committed.clone());
        let controller = Self {
            api: Some(api),
            api_address,
            agents_address,
            tls: ports.api,
            metrics,
            stop,
            stop_api: watch::channel(false).0,
            core: tokio::spawn(core.run()),
            api_server: None,
            agents_server: tokio::spawn(port.serve()),
            sweeper: tokio::spawn(sweeping),
        };
        Ok((controller, Handle(Arc::new(shared))))
    }

    /// Where people and tools connect.
    #[must_use]
    pub fn api_address(&self) -> SocketAddr {
        self.api_address
    }

    /// Where agents connect.
    #[must_use]
    pub fn agents_address(&self) -> SocketAddr {
        self.agents_address
    }

    /// Serves this at the interface's port, over TLS, HTTP/1.1 or HTTP/2, upgrades included. The client's address is in each
    /// request as `axum::extract::ConnectInfo<SocketAddr>`. Only the first call counts.
    pub fn serve_api(&mut self, router: Router) {
        let Some(listener) = self.api.take() else { return };
        let port = Port {
            listener,
            tls: self.tls.clone(),
            router,
            hosts_only: false,
            connections_max: API_CONNECTIONS_MAX,
            metrics: self.metrics.clone(),
            stop: self.stop_api.subscribe(),
        };
        self.api_server = Some(tokio::spawn(port.serve()));
    }

    /// Waits until the loop ends, by itself or because it was told to. Not to be called again afterwards.
    pub async fn ended(&mut self) -> Ended {
        // A loop that panicked has shown why; the process is to end and start anew.
        (&mut self.core).await.unwrap_or(Ended::Failed)
    }

    /// Stops: requests under way may end, what waits is committed and answered, agents are told.
    pub async fn stop(mut self) {
        self.stop_api.send_replace(true);
        if let Some(server) = self.api_server.take() {
            // A server that panicked serves no more either.
            let _ = server.await;
        }
        self.stop.send_replace(true);
        if !self.core.is_finished() {
            self.ended().await;
        }
        let _ = (&mut self.agents_server).await;
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.core.abort();
        self.agents_server.abort();
        self.sweeper.abort();
        self.api_server.iter().for_each(JoinHandle::abort);
    }
}

fn check(config: &Config) -> Result<String, StartError> {
    let refuse = |why: String| Err(StartError::Config(why));
    let Some(name) = config.names.first() else {
        return refuse("give at least one name or address under which this machine is reached".to_owned());
    };
    let DefaultNetwork {
        address,
        prefix,
        gateway,
        first,
        last,
    } = config.network;
    if !(8..=30).contains(&prefix) {
        return refuse(format!("the network's prefix is /{prefix}; /8 to /30 will do"));
    }
    let mask = u32::MAX << (32 - prefix);
    let within = |ip: Ipv4Addr| ip.to_bits() & mask == address.to_bits();
    if address.to_bits() & !mask != 0 {
        let base = Ipv4Addr::from_bits(address.to_bits() & mask);
        return refuse(format!(
            "{address}/{prefix} is not the beginning of a network; {base}/{prefix} is"
        ));
    }
    if !within(first) || !within(last) || first > last || gateway.is_some_and(|gateway| !within(gateway)) {
        return refuse(format!(
            "{first} to {last}, and the gateway, must lie in {address}/{prefix}, in this order"
        ));
    }
    if gateway.is_some_and(|gateway| (first..=last).contains(&gateway)) {
        return refuse(format!(
            "the gateway lies between {first} and {last}, which are given to VMs"
        ));
    }
    Ok(name.clone())
}

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |source| StartError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// `HOST:PORT` as others reach it.
fn endpoint(name: &str, bound: SocketAddr) -> String {
    let address = Address {
        host: name.to_owned(),
        port: bound.port(),
    };
    address.to_string()
}

fn in_state<T>(path: PathBuf, open: impl FnOnce(PathBuf) -> io::Result<T>) -> Result<T, StartError> {
    open(path.clone()).map_err(|source| StartError::State { path, source })
}

/// What is stored; at the first start, a new cell.
async fn begin_world(
    storage: &dyn Storage,
    stored: Stored,
    config: &Config,
    state: &StateDir,
) -> Result<Stored, StartError> {
    if !is_first_start(&stored.rows) {
        return Ok(stored);
    }
    // The token is written first: after a crash in between the next start takes it up.
    let path = state.admin_token();
    let token = if path.exists() {
        ApiToken::read_file(&path)?
    } else {
        let token = ApiToken::generate()?;
        token.create_file(&path)?;
        token
    };
    let network = config.network;
    let changes = World::bootstrap(&Bootstrap {
        project: ProjectId(Uuid::now_v7()),
        network: NetworkId(Uuid::now_v7()),
        subnet: SubnetId(Uuid::now_v7()),
        address: network.address,
        prefix: network.prefix,
        gateway: network.gateway,
        first: network.first,
        last: network.last,
        mtu: MTU,
        token: token_id(&token),
        token_hash: token_hash(&token),
        subject: "admin".to_owned(),
    });
    storage.commit(changes).await?;
    Ok(storage.load().await?)
}

/// For clients on this machine. Written at each start: ports and names may have changed.
fn write_client_files(state: &StateDir, authority: &Authority) -> Result<(), StartError> {
    let certificate = authority.cluster.certificate().to_pem();
    in_state(state.ca_certificate(), |path| fs::write(path, certificate))?;
    let client = ClientFile {
        server: format!("https://{}", authority.api_endpoint),
        ca: state.ca_certificate(),
        token_file: state.admin_token(),
    };
    let text = serde_json::to_string_pretty(&client).expect("a client file has a JSON form");
    Ok(secret_file::replace(&state.client(), format!("{text}\n").as_bytes())?)
}

/// Removes blobs that no host will fetch, now and then.
async fn sweep(blobs: Blobs, committed: Arc<Committed>) {
    let mut every = tokio::time::interval(UNNAMED_KEPT.min(Duration::from_secs(600)));
    loop {
        every.tick().await;
        let (blobs, wanted) = (blobs.clone(), committed.wanted_blobs());
        let swept = tokio::task::spawn_blocking(move || blobs.sweep(&wanted, SystemTime::now())).await;
        match swept {
            Ok(Ok(0)) | Err(_) => {}
            Ok(Ok(count)) => tracing::info!(count, "blobs that no host will fetch were removed"),
            Ok(Err(error)) => tracing::warn!(%error, "blobs could not be removed"),
        }
    }
}
