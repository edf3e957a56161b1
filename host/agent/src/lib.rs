//! The shell on each host: connections, journal file, timers, processes; one `task` for each VM.
//!
//! ```text
//!   controller ◀── session ──▶ ┌────────────────────────────┐ ◀── peers ──▶ other agents
//!                              │ Shared: journal, reports   │
//!                              │  ├─ runner: Task of a VM ──┼──▶ qemu (a process of its own)
//!                              │  ├─ runner: Task of a VM ──┼──▶ tunnel (a process of its own)
//!                              │  └─ …                      │──▶ network, image
//!                              └────────────────────────────┘
//! ```
//!
//! Invariants:
//! - The agent decides nothing about a VM: `task` does. It carries out effects strictly in order, and journals where it is told to.
//! - QEMU and tunnels outlive the agent: killing or upgrading it disturbs no guest and no migration.
//! - Whoever speaks over a connection speaks only for the host or controller in its certificate.
//! - Hand-overs that a restart left open are settled before new work is taken.

mod blobs;
mod config;
mod console;
mod desks;
mod facts;
#[cfg(test)]
#[path = "fixture_tests.rs"]
mod fixture;
mod join;
mod journal;
mod leave;
mod peers;
mod policies;
mod ports;
mod portstate;
mod reports;
mod room;
mod runner;
mod seeds;
mod session;
mod shared;
mod standstill;
mod telemetry;
mod template;
pub mod tunnel;
mod tunnels;
mod verdict;

use std::{collections::BTreeMap, io, os::unix::fs::PermissionsExt as _, path::PathBuf, sync::Arc, time::Duration};

use model::{Name, PoolId, host::Hypervisor};
use network::BridgeSpec;
use tokio::{net::TcpListener, task::JoinSet, time::timeout};

pub use config::{AgentConfig, Membership, StateError};
pub use join::{JoinError, join};
pub use journal::JournalError;
pub use leave::{LeaveError, Standing, standing};

use shared::{NamedPool, Parts, Shared};

/// How long an agent that starts asks whether it is still of its cell; it learns it later otherwise.
///
/// What waits for it are hand-overs, which are to be settled within 2 s.
const STANDING_MAX: Duration = Duration::from_secs(1);

/// Why an agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its state is missing or damaged.
    #[error(transparent)]
    State(#[from] StateError),
    /// It is not of its cell any more.
    #[error("host {host} was removed from its cell: the controller at {controller} no longer knows it")]
    Removed {
        /// The host.
        host: model::HostId,
        /// Who said so.
        controller: String,
    },
    /// Its journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A file or directory cannot be used.
    #[error("cannot use {}", path.display())]
    Path {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// This boot of the kernel is not known.
    #[error("the kernel does not tell its boot id")]
    Boot(#[source] io::Error),
    /// No network access.
    #[error("the network cannot be set up; the agent must run as root")]
    Network(#[from] network::OpenError),
    /// No rules by which what is answered here goes no further.
    #[error("what guests ask cannot be answered on this host; install nftables and let the agent run as root")]
    Answers(#[source] network::NftError),
    /// The kernel gives no random bytes.
    #[error("cannot read /dev/urandom")]
    Random(#[source] io::Error),
    /// No rules for what guests send.
    #[error(
        "what guests send cannot be judged on this host, so none is run; install nftables and let the agent run as root"
    )]
    Policies(#[from] network::NftError),
    /// No bridge.
    #[error("the bridge of VMs cannot be set up")]
    Bridge(#[from] network::BridgeError),
    /// A pool cannot be used.
    #[error("pool {name} cannot be used")]
    Pool {
        /// Its name.
        name: Name,
        /// Why.
        source: image::PoolError,
    },
    /// QEMU does not answer.
    #[error("QEMU cannot be used; install qemu-system-x86 (7.2 or newer), or name it with --qemu")]
    Qemu(#[from] qemu::DiscoverError),
    /// QEMU runs no guest.
    #[error("QEMU runs no guest on this host")]
    Probe(#[from] qemu::ProbeError),
    /// The port for other agents cannot be had.
    #[error("cannot listen on {address} for other agents; give an address of this host with --address")]
    Listen {
        /// The address.
        address: std::net::IpAddr,
        /// Why.
        source: io::Error,
    },
}

/// An agent that runs.
pub struct Agent {
    shared: Arc<Shared>,
    hypervisor: Hypervisor,
    /// What hand-overs need, from before it is known which guests can run here.
    serving: JoinSet<()>,
}

impl Agent {
    /// Finds out what this host is, and takes up the VMs that run on it. The host must have joined a cell.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(config: AgentConfig) -> Result<Self, StartError> {
        let program = &config.exe;
        let tunnels = tunnel::Program::open(program).map_err(|source| StartError::Path {
            path: program.clone(),
            source,
        })?;
        let (membership, identity) = config.membership()?;
        let boot = facts::boot_id().map_err(StartError::Boot)?;
        let journal = journal::Journal::open(&config.journal_path(), boot)?;
        make_run_dir(&config)?;
        let network = network::Network::open()?;
        network.ensure_answers().map_err(StartError::Answers)?;
        let desks = desks::Common::new().map_err(StartError::Random)?;
        network.ensure_policies()?;
        network.ensure_bridge(&BridgeSpec {
            name: config.bridge.clone(),
            mtu: config.mtu,
            uplink: config.uplink.clone(),
            gateway: config.gateway,
        })?;
        let pools = open_pools(&config)?;
        let path = config.state_dir.join("ports");
        let policies = policies::Policies::open(path.clone()).map_err(|source| StartError::Path { path, source })?;
        // Not for ever: guests that wait for this agent wait no longer for a controller that does not answer.
        if let Ok(Ok(Standing::Removed(_))) = timeout(STANDING_MAX, standing(&config)).await {
            // Nothing is taken up: its VMs may run elsewhere by now.
            let Membership { host, controller, .. } = membership;
            return Err(StartError::Removed { host, controller });
        }
        let address = config.address;
        let listening = listen_for_peers(&config).await;
        let (listener, peer_port) = listening.map_err(|source| StartError::Listen { address, source })?;
        let parts = Parts {
            config,
            membership,
            boot,
            peer_port,
            network,
            desks,
            policies,
            pools,
            identity,
            journal,
            tunnels,
        };
        let shared = Shared::new(parts);
        // A guest may stand until its hand-over is settled, and what is here already runs: only new guests wait for what follows.
        shared.take_up();
        let mut serving = JoinSet::new();
        serving.spawn(peers::listen(Arc::clone(&shared), listener));
        serving.spawn(Arc::clone(&shared).sync_journal());
        let hypervisor = find_hypervisor(&shared).await?;
        Ok(Self {
            shared,
            hypervisor,
            serving,
        })
    }

    /// This host's id.
    #[must_use]
    pub fn host(&self) -> model::HostId {
        self.shared.host()
    }

    /// What the cell called this host when it joined; `None` where it did not say.
    #[must_use]
    pub fn name(&self) -> Option<&Name> {
        self.shared.membership.name.as_ref()
    }

    /// Runs until it is dropped. VMs and migrations go on without it.
    pub async fn run(self) {
        let Self {
            shared,
            hypervisor,
            serving,
        } = self;
        tokio::join!(
            session::keep(Arc::clone(&shared), hypervisor),
            telemetry::keep_telling(Arc::clone(&shared)),
            Arc::clone(&shared).tell_traffic(),
            join::keep_fresh(shared),
            serving.join_all(),
        );
    }
}

/// Finds out what QEMU can do here, and lets VMs start.
async fn find_hypervisor(shared: &Shared) -> Result<Hypervisor, StartError> {
    let program = qemu::Program::locate(Some(&shared.config.qemu));
    let capabilities = qemu::discover(&program).await?;
    let verdict = verdict::of(shared, &program, &capabilities).await?;
    tracing::info!(qemu = %capabilities.version, accelerator = %verdict.accelerator, reason = verdict.reason, "hypervisor");
    let hypervisor = capabilities.hypervisor(verdict.accelerator, verdict.reason);
    shared.has_hypervisor(qemu::Qemu::new(program, capabilities));
    Ok(hypervisor)
}

/// Listens for other agents, at the port of the last time if that is free: a hand-over that is under way names it.
async fn listen_for_peers(config: &AgentConfig) -> io::Result<(TcpListener, u16)> {
    let record = config.state_dir.join("peer-port");
    let last = std::fs::read_to_string(&record)
        .ok()
        .and_then(|text| text.trim().parse().ok());
    let listener = match TcpListener::bind((config.address, last.unwrap_or(0))).await {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => TcpListener::bind((config.address, 0)).await?,
        other => other?,
    };
    let port = listener.local_addr()?.port();
    std::fs::write(&record, port.to_string())?;
    Ok((listener, port))
}

/// Each VM's directory in it is the VM's own; to reach it, its user must pass through this one.
fn make_run_dir(config: &AgentConfig) -> Result<(), StartError> {
    let fail = |source| StartError::Path {
        path: config.run_dir.clone(),
        source,
    };
    std::fs::create_dir_all(&config.run_dir).map_err(fail)?;
    std::fs::set_permissions(&config.run_dir, std::fs::Permissions::from_mode(0o711)).map_err(fail)
}

fn open_pools(config: &AgentConfig) -> Result<BTreeMap<PoolId, Arc<NamedPool>>, StartError> {
    let mut pools = BTreeMap::new();
    for (name, root) in &config.pools {
        let id = facts::pool_id(root).map_err(|source| StartError::Path {
            path: root.clone(),
            source,
        })?;
        let pool = image::Pool::open(root).map_err(|source| StartError::Pool {
            name: name.clone(),
            source,
        })?;
        pools.insert(
            id,
            Arc::new(NamedPool {
                name: name.clone(),
                pool,
                room: Arc::default(),
            }),
        );
    }
    Ok(pools)
}
