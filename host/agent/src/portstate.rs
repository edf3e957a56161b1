//! What a port has of its guest and goes where the guest goes: connections that its rules let go on, and what it has counted.
//!
//! ```text
//!   source: the guest may stand soon ──▶ flows ─────────────▶ destination's sets, its port still blocked
//!           the guest runs over there ─▶ flows, traffic ────▶ again, with what came meanwhile
//! ```
//!
//! Nothing waits for this. What is lost of it is found again where a packet that the guest sends may begin it anew.

use std::sync::Arc;

use model::{Generation, HostId, PortId, VmId};
use task::{Role, Saved};
use wire::{PortState, peer::FLOWS_MAX};

use crate::{
    shared::Shared,
    standstill::{Portion, is_its},
};

/// Where a guest goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct To {
    pub(crate) vm: VmId,
    pub(crate) host: HostId,
    pub(crate) granted: Generation,
}

impl To {
    /// Where a VM that moves away goes.
    pub(crate) fn of(saved: &Saved) -> Option<Self> {
        let Role::Source { terms, .. } = &saved.role else {
            return None;
        };
        Some(Self {
            vm: saved.vm,
            host: terms.destination,
            granted: terms.granted,
        })
    }
}

/// Says what a port has of its guest, aside.
pub(crate) fn leave(shared: &Arc<Shared>, to: To, port: PortId, stands: bool) {
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let reader = Arc::clone(&shared);
        let read = tokio::task::spawn_blocking(move || reader.policies.leave(&reader.network, port, stands)).await;
        let (flows, traffic) = match read {
            Ok(Ok(read)) => read,
            Ok(Err(why)) => {
                tracing::warn!(vm = %to.vm, %port, why, "what is under way at a port does not go with its guest");
                return;
            }
            // The agent ends.
            Err(_) => return,
        };
        let mut portions: Vec<PortState> = flows
            .chunks(FLOWS_MAX)
            .map(|flows| PortState {
                vm: to.vm,
                granted: to.granted,
                port,
                flows: flows.to_vec(),
                traffic: None,
            })
            .collect();
        if let Some(traffic) = traffic {
            let last = PortState {
                vm: to.vm,
                granted: to.granted,
                port,
                flows: vec![],
                traffic: Some(traffic),
            };
            portions.push(last);
        }
        let (count, parts) = (flows.len(), portions.len());
        for state in portions {
            if !shared.peers.hand_over(to.host, Portion::Port(state)).await {
                tracing::warn!(vm = %to.vm, %port, "there is no connection to tell of what is under way at a port");
                return;
            }
        }
        tracing::debug!(vm = %to.vm, %port, flows = count, parts, stands, "what is under way at a port was said");
    });
}

/// Takes what another agent says of a port, if the guest comes, or came, from there. Takes as long as another program.
pub(crate) fn arrive(shared: &Shared, from: HostId, state: PortState) {
    let PortState {
        vm,
        granted,
        port,
        flows,
        traffic,
    } = state;
    let expected = |saved: &Saved| is_its(saved, from, granted, port) || comes(saved, from, granted, port);
    if !shared.saved_of(vm).is_some_and(|saved| expected(&saved)) {
        tracing::debug!(%vm, %port, %from, "the state of a port whose guest does not come from there is dropped");
        return;
    }
    let count = flows.len();
    match shared.policies.arrive(&shared.network, port, flows, traffic) {
        Ok(()) => tracing::debug!(%vm, %port, flows = count, "what is under way at the port goes on"),
        Err(why) => tracing::warn!(%vm, %port, why, "what was under way at the port is lost"),
    }
}

/// Whether the VM is on its way here by the hand-over that is named, from that host, and the port is one of its own.
fn comes(saved: &Saved, from: HostId, granted: Generation, port: PortId) -> bool {
    let Role::Destination { terms, .. } = &saved.role else {
        return false;
    };
    let ports = saved.definition.iter().flat_map(|definition| &definition.ports);
    terms.source == from && terms.granted == granted && ports.into_iter().any(|its| its.port == port)
}
