//! A VM's ports on this host, as its runner knows them: opened at once, and again and again where that failed.
//!
//! ```text
//!   taps made, or found ──▶ known ──┐
//!   guest may run ────▶ wanted ─────┴─▶ open: one datagram      not known, or refused ──▶ looked for aside, after a pause
//! ```
//!
//! Invariant: opening a port, which may lie in a blackout, never waits behind a listing of the kernel's. Only looking for one does,
//! and that is done on another thread.

use std::{collections::BTreeMap, time::Duration};

use model::{PortId, VmId, order::PortUse};
use network::{Announcement, Network, Port};
use tokio::time::Instant;

use crate::template::chain;

/// Between two tries to open a port, at first and at most.
const AGAIN_MIN: Duration = Duration::from_millis(100);
const AGAIN_MAX: Duration = Duration::from_secs(10);

/// What came of looking for a VM's ports.
pub(crate) type Found = Vec<(PortId, Result<Port, String>)>;

/// A VM's ports.
#[derive(Debug, Default)]
pub(crate) struct Ports {
    known: BTreeMap<PortId, Port>,
    /// Those that should be open and are not.
    wanted: Vec<PortUse>,
    /// When they are tried again.
    again: Option<Instant>,
    pause: Duration,
}

impl Ports {
    /// These were made, or found.
    pub(crate) fn know(&mut self, ports: impl IntoIterator<Item = Port>) {
        self.known.extend(ports.into_iter().map(|port| (port.id, port)));
    }

    /// One of them, if it is known here.
    pub(crate) fn known(&self, port: PortId) -> Option<&Port> {
        self.known.get(&port)
    }

    /// All that are known here.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Port> {
        self.known.values()
    }

    /// Those of which only the kernel knows as yet.
    pub(crate) fn unknown(&self, ports: &[PortUse]) -> Vec<PortId> {
        let ids = ports.iter().map(|port| port.port);
        ids.filter(|port| !self.known.contains_key(port)).collect()
    }

    /// Nothing of them is left here.
    pub(crate) fn forget(&mut self) {
        *self = Self::default();
    }

    /// The guest stands, or is gone: what is not open need not be.
    pub(crate) fn close(&mut self) {
        self.wanted.clear();
        self.again = None;
    }

    /// Opens these. Where [`Ports::again_at`] says so afterwards, some are to be looked for.
    pub(crate) fn open(&mut self, network: &Network, vm: VmId, ports: &[PortUse]) {
        self.wanted = ports.to_vec();
        self.again = None;
        self.pause = AGAIN_MIN;
        // One that is not known is looked for at once.
        let now = Instant::now();
        self.try_wanted(network, vm, now);
    }

    /// When those that are not open are to be looked for: see [`Ports::missing`].
    pub(crate) fn again_at(&self) -> Option<Instant> {
        self.again
    }

    /// Those to be looked for now; [`Ports::found`] goes on.
    pub(crate) fn missing(&mut self) -> Vec<PortId> {
        self.again = None;
        self.wanted.iter().map(|port| port.port).collect()
    }

    /// They were looked for: tries again to open what is wanted still.
    pub(crate) fn found(&mut self, network: &Network, vm: VmId, found: Found) {
        for (port, result) in found {
            match result {
                Ok(found) => self.know([found]),
                Err(why) => {
                    self.known.remove(&port);
                    if self.wanted.iter().any(|wanted| wanted.port == port) {
                        tracing::error!(%vm, %port, why, "the VM's port was not found; it is looked for again");
                    }
                }
            }
        }
        self.pause = (self.pause * 2).clamp(AGAIN_MIN, AGAIN_MAX);
        let pause = Instant::now() + self.pause;
        self.try_wanted(network, vm, pause);
    }

    fn try_wanted(&mut self, network: &Network, vm: VmId, again: Instant) {
        let known = &self.known;
        self.wanted.retain(|wanted| {
            let Some(port) = known.get(&wanted.port) else { return true };
            let opened = network.open_port(port, &Announcement::new(wanted.mac, &[wanted.ip.into()]));
            opened
                .inspect_err(|error| {
                    let why = chain(error);
                    tracing::error!(%vm, port = %wanted.port, why, "the VM has no network: its port was not opened; tried again");
                })
                .is_err()
        });
        self.again = (!self.wanted.is_empty()).then_some(again);
    }
}

/// Looks for ports. Waits as long as the kernel's listings take.
pub(crate) fn look_for(network: &Network, ports: Vec<PortId>) -> Found {
    let look = |port| (port, look_for_one(network, port));
    ports.into_iter().map(look).collect()
}

/// Looks for one port, with the same wait.
pub(crate) fn look_for_one(network: &Network, port: PortId) -> Result<Port, String> {
    match network.find_port(port) {
        Ok(Some(found)) => Ok(found.port),
        Ok(None) => Err("its tap is gone".to_owned()),
        Err(error) => Err(chain(&error)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends where its promise is broken")]

    use std::process::Command;

    use model::Mac;
    use network::{BridgeSpec, Tap, in_throwaway_namespace};
    use uuid::Uuid;

    use super::*;

    const VM: VmId = VmId(Uuid::from_u128(1));

    /// A network with one tap, blocked, and its use.
    fn one() -> (Network, Tap, PortUse) {
        let network = Network::open().unwrap();
        let bridge = BridgeSpec {
            name: "br0".parse().unwrap(),
            mtu: 1500,
            uplink: None,
            gateway: None,
        };
        network.ensure_bridge(&bridge).unwrap();
        let port = PortId(Uuid::from_u128(7));
        let tap = network.create_tap(port, &bridge.name).unwrap();
        let used = PortUse {
            port,
            mac: Mac([0x52, 0x54, 0, 0, 0, 1]),
            ip: [10, 0, 0, 2].into(),
            prefix: 24,
            gateway: None,
            mtu: 1500,
            v6: None,
            addressing: model::addressing::Addressing::default(),
            policy: model::PortPolicy::default(),
        };
        (network, tap, used)
    }

    fn is_open(network: &Network, port: PortId) -> bool {
        network.find_port(port).unwrap().unwrap().open
    }

    fn link(tap: &str, state: &str) {
        let set = Command::new("ip").args(["link", "set", tap, state]).status();
        assert!(set.unwrap().success());
    }

    #[test]
    fn a_port_that_is_known_is_opened_at_once_and_another_when_it_is_found() {
        in_throwaway_namespace(|_| {
            let (network, tap, used) = one();
            let mut ports = Ports::default();
            ports.know([tap.port.clone()]);
            ports.open(&network, VM, std::slice::from_ref(&used));
            assert!(is_open(&network, used.port) && ports.again_at().is_none());
            network.block_port(&tap.port).unwrap();
            // An agent that was restarted.
            let mut ports = Ports::default();
            assert_eq!(ports.unknown(std::slice::from_ref(&used)), [used.port]);
            ports.open(&network, VM, std::slice::from_ref(&used));
            assert!(ports.again_at().unwrap() <= Instant::now(), "it is looked for at once");
            let missing = ports.missing();
            ports.found(&network, VM, look_for(&network, missing));
            assert!(is_open(&network, used.port) && ports.again_at().is_none());
        })
        .unwrap();
    }

    #[test]
    fn a_port_that_could_not_be_opened_is_tried_again_until_it_is_open_or_not_wanted() {
        in_throwaway_namespace(|_| {
            let (network, tap, used) = one();
            let mut ports = Ports::default();
            ports.know([tap.port.clone()]);
            link(&tap.port.tap, "down");
            ports.open(&network, VM, std::slice::from_ref(&used));
            let mut pauses = vec![];
            for _ in 0..10 {
                assert!(ports.again_at().is_some());
                let missing = ports.missing();
                let before = Instant::now();
                ports.found(&network, VM, look_for(&network, missing));
                pauses.push(ports.again_at().unwrap() - before);
            }
            assert!(pauses[0] >= AGAIN_MIN && pauses[9] >= AGAIN_MAX, "{pauses:?}");
            link(&tap.port.tap, "up");
            let missing = ports.missing();
            ports.found(&network, VM, look_for(&network, missing));
            assert!(is_open(&network, used.port) && ports.again_at().is_none());
            // Of one whose guest has left, nothing is tried.
            link(&tap.port.tap, "down");
            ports.open(&network, VM, std::slice::from_ref(&used));
            ports.close();
            assert!(ports.again_at().is_none() && ports.missing().is_empty());
        })
        .unwrap();
    }
}
