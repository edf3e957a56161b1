//! Pure decisions: what the cell does next, given the world and an event.
//!
//! ```text
//!  Request ─▶ request ─▶ create ─ lifecycle ─ migration ─ cancel ─ hosts ─ templates
//!                            │  people, projects, placement, ...  │
//!  Report ──▶ reports ───────┤                                    ▼
//!  Facts ───▶ hosts ─────────┼──────────────▶ Txn ─▶ World (rows + index) + Vec<Effect>
//!  Tick ────▶ tick ─▶ reconcile ─────────────▲
//! ```
//!
//! Invariants:
//! - Each of these is checked by [`audit`] or by the seeded tests after every step.
//! - The world changes through one type only, which records each change: a copy that applies the effects is the same world.
//! - A host never holds more than it offers; a move under way counts on both ends until each has said that it is clear.
//! - A VM's generation only grows, and is never given to two hosts. The destination's word alone makes it the holder; the source
//!   gets the VM back only by its own word that it never gave it up, or that the destination declined.
//! - At most one operation holds a VM, and every operation ends at its `ends_by` at the latest.
//! - Each request's right is looked up again in its own step, and each decision leaves an audit entry in that step's changes.
//! - A refused request changes nothing else. A report about a VM counts only from a host that the world places it on, or that its
//!   terms name: one compromised agent touches only its own VMs.
//! - Nothing is restarted elsewhere by itself: a lost host is an alarm, and a person alone may say that its machine is off for good.
//! - Nothing here walks all VMs: a step costs what it concerns, a tick is bounded.

mod abandon;
mod addressing;
pub mod audit;
mod bootstrap;
mod cancel;
mod capacity;
mod create;
mod definition;
mod groups;
mod heard;
mod hosts;
mod index;
mod lifecycle;
mod migration;
mod moves;
mod people;
mod placement;
mod ports;
mod projects;
mod query;
mod reconcile;
mod reports;
mod request;
mod stranded;
mod templates;
mod tick;
mod txn;
mod world;

use model::{Effect, Event, Report, Timestamp, order::Subject};

pub use bootstrap::Bootstrap;
pub use index::Held;
pub use request::replayed;
pub use tick::ANSWER_KEPT;
pub use txn::NOTICES_MAX;
pub use world::{LoadError, World};

/// Decides what an event leads to. The world is changed at once; the effects hold the same changes for the store, in the order in
/// which they must be made, and then what to send once they are committed.
pub fn step(world: &mut World, event: Event, now: Timestamp) -> Vec<Effect> {
    let mut txn = txn::Txn::begin(world, now);
    match event {
        Event::Request(request) => request::handle(&mut txn, &request),
        Event::Connected(host) => hosts::connected(&mut txn, host),
        Event::Disconnected(host) => hosts::disconnected(&mut txn, host),
        // A host that was removed, or never joined, has nothing to say.
        Event::Report(host, _) if txn.world().host(host).is_none() => {}
        Event::Report(host, report) => match heard::bounded(*report) {
            Report::Facts(facts) => hosts::facts(&mut txn, host, &facts),
            Report::Inventory { vms } => hosts::inventory(&mut txn, host, &vms, (None, None)),
            Report::InventoryPart { vms, after, up_to } => hosts::inventory(&mut txn, host, &vms, (after, up_to)),
            Report::Vm(report) => reports::vm(&mut txn, host, &report),
            Report::Template(report) => templates::report(&mut txn, host, &report),
            Report::Port(report) => ports::report(&mut txn, host, &report),
            Report::Progress { operation, progress } => reports::progress(&mut txn, host, operation, progress),
            Report::Relay(relay) => moves::relay(&mut txn, host, relay),
        },
        Event::Tick => tick::tick(&mut txn),
    }
    txn.end()
}

/// The least subject of an outbox.
pub(crate) fn subject_min() -> Subject {
    Subject::Vm(model::VmId(world::uuid_min()))
}
