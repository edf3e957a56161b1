//! What guests of a network are told beside their IPv4 addresses: who may say so, and when.

use model::{Code, Network, Outcome, Refusal, Request, Row, addressing::Addressing, name::Reference};

use crate::{
    projects,
    request::{Decision, refuse},
    txn::Txn,
    world::World,
};

/// Says what a network's guests are told.
pub(crate) fn set(txn: &mut Txn<'_>, request: &Request, reference: &Reference, wanted: &Addressing) -> Decision {
    let mut network = own(txn.world(), request, reference)?.clone();
    check(&network.name, wanted)?;
    let used = txn.world().index.addresses_used.get(&network.id).copied().unwrap_or(0);
    let prefix = |told: &Addressing| told.v6.map(|v6| v6.address);
    if used > 0 && prefix(wanted) != prefix(&network.addressing) {
        let message = format!(
            "network {} has {used} addresses in use; its IPv6 prefix cannot change under them",
            network.name
        );
        let hint = "delete its VMs first, their addresses rest for a minute; or make another network";
        return Err(refuse(Code::WrongState, message, hint));
    }
    if !request.dry_run && network.addressing != *wanted {
        network.addressing = wanted.clone();
        txn.put(Row::Network(network));
    }
    Ok(Outcome::Done)
}

/// Refuses what guests cannot be told.
pub(crate) fn check(network: &model::Name, wanted: &Addressing) -> Result<(), Box<Refusal>> {
    wanted.check().map_err(|error| {
        let message = format!("network {network}: {error}");
        Box::new(Refusal::new(Code::InvalidInput, message))
    })
}

/// The network that is meant, of the actor's own project: one that it only shares is not its to change.
fn own<'w>(world: &'w World, request: &Request, reference: &Reference) -> Result<&'w Network, Box<Refusal>> {
    let project = request.actor.project;
    let found = projects::network(world, project, reference).and_then(|id| world.networks.get(&id));
    let network = found.ok_or_else(|| {
        let message = format!("there is no network {reference} in this project");
        refuse(Code::NotFound, message, "`godwit network list` shows what there is")
    })?;
    if network.project == project {
        return Ok(network);
    }
    let message = format!(
        "this project has no network {} of its own; the one that it uses is project default's",
        network.name
    );
    Err(refuse(
        Code::NotFound,
        message,
        "ask an administrator of project default",
    ))
}
