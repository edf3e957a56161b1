//! What the ports of this host let through: the newest policy of each that the controller has said, set as soon as the port is there.
//!
//! ```text
//!   Start, Receive: definition ──▶ prepare ──┐
//!   Order::Port ─────────────────▶ order ────┼──▶ newest ──▶ rules, limits      its file outlives the agent
//!   Clear ───────────────────────▶ forget ───┘
//! ```
//!
//! Invariants:
//! - A port's rules are set before it can be opened, and only ever by a policy that is not older than the one before.
//! - Work on a port is done in turn, aside from the runners: it takes another program some milliseconds.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use model::{
    Code, PortId, Refusal,
    order::PortUse,
    policy::{Flow, Traffic},
};
use network::{Drops, Identity, Network, PolicyError, PortCounters, PortError};
use serde::{Deserialize, Serialize};
use wire::PortTraffic;

use crate::{shared::lock, template::chain};

/// The ports of this host.
#[derive(Debug)]
pub(crate) struct Policies {
    directory: PathBuf,
    ports: Mutex<BTreeMap<PortId, Arc<Entry>>>,
}

/// Why what a port lets through was not set.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SetError {
    #[error(transparent)]
    Rules(#[from] PolicyError),
    #[error(transparent)]
    Limits(#[from] PortError),
}

#[derive(Debug, Default)]
struct Entry {
    /// Counts the taps that it had: what removes the rules of one must not remove those of the next.
    life: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    newest: Option<PortUse>,
    /// What went through it where its guest was before.
    before: Traffic,
    /// Whether its rules are set.
    here: bool,
}

/// A port's file.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    port: PortUse,
    #[serde(default)]
    before: Traffic,
}

impl Policies {
    /// Those that were told before the agent's restart.
    pub(crate) fn open(directory: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&directory)?;
        let mut ports = BTreeMap::new();
        for file in fs::read_dir(&directory)? {
            let path = file?.path();
            match read(&path) {
                Ok(Kept { port, before }) => {
                    let id = port.port;
                    let state = Mutex::new(State {
                        newest: Some(port),
                        before,
                        here: false,
                    });
                    let entry = Entry {
                        life: AtomicU64::new(0),
                        state,
                    };
                    ports.insert(id, Arc::new(entry));
                }
                // Half written when the machine lost power: its port's rules, and its QEMU, are gone as well.
                Err(why) => {
                    tracing::warn!(path = %path.display(), why, "a port's policy cannot be read; it is removed");
                    fs::remove_file(&path)?;
                }
            }
        }
        Ok(Self {
            directory,
            ports: Mutex::new(ports),
        })
    }

    fn entry(&self, port: PortId) -> Arc<Entry> {
        Arc::clone(lock(&self.ports).entry(port).or_default())
    }

    /// A port's tap was made: its rules are set, and its traffic is counted from nothing. Takes as long as another program.
    pub(crate) fn prepare(&self, network: &Network, port: &PortUse) -> Result<(), SetError> {
        let entry = self.entry(port.port);
        lock(&entry.state).before = Traffic::default();
        self.begin(network, port, &entry)
    }

    fn begin(&self, network: &Network, port: &PortUse, entry: &Entry) -> Result<(), SetError> {
        let mut state = lock(&entry.state);
        entry.life.fetch_add(1, Ordering::AcqRel);
        let newest = self.take(&mut state, port);
        set(network, &newest)?;
        state.here = true;
        Ok(())
    }

    /// After a restart: as [`Policies::prepare`], for a tap that was made before.
    pub(crate) fn renew(&self, network: &Network, port: &PortUse) {
        let there = matches!(network.find_port(port.port), Ok(Some(_)));
        if there && let Err(error) = self.begin(network, port, &self.entry(port.port)) {
            // They are as they were: the kernel kept them.
            tracing::error!(port = %port.port, why = chain(&error), "a port's rules were not set anew");
        }
    }

    /// The controller said something new of a port. Takes as long as another program.
    pub(crate) fn order(&self, network: &Network, port: &PortUse) -> Result<(), Refusal> {
        let entry = self.entry(port.port);
        let mut state = lock(&entry.state);
        let newest = self.take(&mut state, port);
        if !state.here {
            return Ok(());
        }
        set(network, &newest).map_err(|error| {
            let message = format!("port {}: its rules were not set: {}", port.port, chain(&error));
            Refusal::new(Code::HostFailed, message)
        })
    }

    /// What went with a guest's port from the host that it left. What is not allowed here does not go on.
    pub(crate) fn arrive(
        &self,
        network: &Network,
        port: PortId,
        flows: Vec<Flow>,
        before: Option<Traffic>,
    ) -> Result<(), String> {
        let entry = lock(&self.ports).get(&port).cloned().ok_or("the port is not here")?;
        let mut state = lock(&entry.state);
        let Some(newest) = state.newest.clone().filter(|_| state.here) else {
            return Err("the port is not here".to_owned());
        };
        if let Some(before) = before {
            state.before = before;
            if let Err(error) = write(
                &self.file(port),
                &Kept {
                    port: newest.clone(),
                    before,
                },
            ) {
                tracing::warn!(%port, %error, "what went through a port before was not written down");
            }
        }
        let Some(filter) = &newest.policy.filter else {
            return Ok(());
        };
        let flows: Vec<Flow> = flows.into_iter().filter(|flow| filter.allows(flow)).collect();
        network.add_flows(port, &flows).map_err(|error| chain(&error))
    }

    /// What went through the ports that are here, in all.
    pub(crate) fn traffic(&self, network: &Network) -> Result<Vec<PortTraffic>, String> {
        let counters = network.all_counters().map_err(|error| chain(&error))?;
        let drops = network.drops().map_err(|error| chain(&error))?;
        let entries: Vec<_> = lock(&self.ports)
            .iter()
            .map(|(port, entry)| (*port, Arc::clone(entry)))
            .collect();
        let here = entries.into_iter().filter_map(|(port, entry)| {
            let before = Some(lock(&entry.state)).filter(|state| state.here)?.before;
            let drops = drops.get(&network::tap_name(port)).copied().unwrap_or_default();
            let traffic = before.plus(traffic_of(counters.get(&port)?, drops));
            Some(PortTraffic { port, traffic })
        });
        Ok(here.collect())
    }

    /// What goes with a port's guest; its traffic once the guest stands.
    pub(crate) fn leave(
        &self,
        network: &Network,
        port: PortId,
        stands: bool,
    ) -> Result<(Vec<Flow>, Option<Traffic>), String> {
        let flows = network.flows(port).map_err(|error| chain(&error))?;
        if !stands {
            return Ok((flows, None));
        }
        let all = self.traffic(network)?;
        let traffic = all
            .into_iter()
            .find(|known| known.port == port)
            .map(|known| known.traffic);
        Ok((flows, traffic))
    }

    /// A port is not here any more. The rules are removed aside, unless it comes again meanwhile.
    pub(crate) fn forget(self: &Arc<Self>, network: Arc<Network>, port: PortId) {
        let Some(entry) = lock(&self.ports).get(&port).cloned() else {
            return;
        };
        let life = entry.life.load(Ordering::Acquire);
        let policies = Arc::clone(self);
        tokio::task::spawn_blocking(move || policies.remove(&network, port, &entry, life));
    }

    fn remove(&self, network: &Network, port: PortId, entry: &Entry, life: u64) {
        let mut state = lock(&entry.state);
        if entry.life.load(Ordering::Acquire) != life {
            return;
        }
        if let Err(error) = network.remove_policy(port) {
            tracing::warn!(%port, why = chain(&error), "a port's rules were not removed");
        }
        state.here = false;
        state.newest = None;
        state.before = Traffic::default();
        // A next one may wait for the entry already: it finds it empty, and its own file is written after this one is gone.
        if let Err(error) = fs::remove_file(self.file(port))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%port, %error, "a port's policy was not forgotten");
        }
        let mut ports = lock(&self.ports);
        if ports.get(&port).is_some_and(|kept| Arc::strong_count(kept) <= 2) {
            ports.remove(&port);
        }
    }

    /// Those of VMs that are not here: an agent that was killed may have left them.
    pub(crate) fn left(&self, here: &BTreeSet<PortId>) -> Vec<PortId> {
        let ports = lock(&self.ports);
        ports.keys().filter(|port| !here.contains(port)).copied().collect()
    }

    /// Forgets those, unless they came again meanwhile, and the rules of taps that are gone.
    pub(crate) fn sweep(&self, network: &Network, left: &[PortId], here: &BTreeSet<PortId>) {
        for port in left {
            self.remove(network, *port, &self.entry(*port), 0);
        }
        if let Err(error) = network.sweep_policies(here) {
            tracing::warn!(why = chain(&error), "rules of ports that are gone were not removed");
        }
    }

    /// The newer of what is known and what is said, written down.
    fn take(&self, state: &mut State, said: &PortUse) -> PortUse {
        let known = state
            .newest
            .take()
            .filter(|known| known.policy.revision > said.policy.revision);
        let newest = known.unwrap_or_else(|| said.clone());
        let kept = Kept {
            port: newest.clone(),
            before: state.before,
        };
        if let Err(error) = write(&self.file(said.port), &kept) {
            // The controller tells it again with the next order that starts or moves the VM.
            tracing::error!(port = %said.port, %error, "a port's policy was not written down");
        }
        state.newest = Some(newest.clone());
        newest
    }

    fn file(&self, port: PortId) -> PathBuf {
        self.directory.join(format!("{port}.json"))
    }
}

/// Limits first: what is not judged yet cannot be more than it may be.
fn set(network: &Network, port: &PortUse) -> Result<(), SetError> {
    network.set_limits(port.port, &port.policy)?;
    Ok(network.set_policy(port.port, &identity(port), &port.policy)?)
}

/// Whose a port is.
fn identity(port: &PortUse) -> Identity {
    Identity {
        mac: port.mac,
        addresses: [Some(port.ip.into()), port.v6.map(Into::into)]
            .into_iter()
            .flatten()
            .collect(),
    }
}

fn traffic_of(counted: &PortCounters, drops: Drops) -> Traffic {
    Traffic {
        received_bytes: counted.received_bytes,
        received_frames: counted.received_frames,
        sent_bytes: counted.sent_bytes,
        sent_frames: counted.sent_frames,
        spoofed_frames: drops.spoofed,
        filtered_to_guest_frames: drops.to_guest,
        filtered_from_guest_frames: drops.from_guest,
    }
}

fn read(path: &Path) -> Result<Kept, String> {
    let text = fs::read(path).map_err(|error| error.to_string())?;
    serde_json::from_slice(&text).map_err(|error| error.to_string())
}

/// Whole, or as it was.
fn write(path: &Path, port: &Kept) -> io::Result<()> {
    let fresh = path.with_extension("new");
    fs::write(&fresh, serde_json::to_vec(port)?)?;
    fs::rename(&fresh, path)
}
