//! Hosts: joining, leaving, and what their agents say of them.

use std::collections::{BTreeMap, BTreeSet};

use model::{
    Code, Host, HostFacts, HostId, Key, Millis, Name, OperationKind, Outcome, Pool, PoolId, Request, Row, TokenId,
    VmId,
    access::JoinToken,
    host::{HostSpec, HostStatus, Link, PoolFacts},
    name::Reference,
    operation::TargetKind,
    order::VmObserved,
    storage::PoolDriver,
};

use crate::{
    reconcile, reports,
    request::{self, Decision, Fresh, refuse},
    stranded,
    txn::{Txn, target},
};

/// Longest life of a join token.
const TOKEN_LIFE_MAX: Millis = Millis::seconds(30 * 24 * 3600);
/// A host's bad reports are told to people at most this often.
const COMPLAINT_EVERY: Millis = Millis::seconds(60);

/// Lets one host join.
pub(crate) fn add_token(txn: &mut Txn<'_>, request: &Request, token: &JoinToken) -> Decision {
    if token.expires_at <= txn.now || token.expires_at > txn.now.after(TOKEN_LIFE_MAX) {
        let message = "the join token's end is not within the next 30 days";
        return Err(refuse(
            Code::InvalidInput,
            message,
            "choose a shorter life, such as one hour",
        ));
    }
    if txn.world().join_tokens.contains_key(&token.id) {
        return Err(refuse(
            Code::InvalidInput,
            "there is a join token with this id",
            "make a new one",
        ));
    }
    if !request.dry_run {
        txn.put(Row::JoinToken(token.clone()));
    }
    Ok(Outcome::Done)
}

/// Takes a host in, and its token out: a token serves once.
pub(crate) fn join(txn: &mut Txn<'_>, request: &Request, token: TokenId, host: HostId, wish: &Name) -> Decision {
    let world = txn.world();
    let valid = world
        .join_tokens
        .get(&token)
        .is_some_and(|token| token.expires_at > txn.now);
    if !valid {
        let message = "the join token was used, has expired or never was";
        return Err(refuse(
            Code::Unauthenticated,
            message,
            "make a new one: `godwit host add-token`",
        ));
    }
    if world.hosts.contains_key(&host) {
        let message = format!("host {host} has joined already");
        return Err(refuse(Code::WrongState, message, "start its agent without --join"));
    }
    if request.dry_run {
        return Ok(Outcome::Done);
    }
    let name = request::unique(wish, |name| world.index.host_names.contains_key(name));
    txn.delete(Key::JoinToken(token));
    txn.put(Row::Host(Box::new(Host {
        id: host,
        name,
        spec: HostSpec::default(),
        status: HostStatus {
            link: Link::Lost,
            since: txn.now,
            facts: None,
        },
        joined_at: txn.now,
    })));
    txn.notice_host(host, "host.joined", String::new());
    Ok(Outcome::Done)
}

/// Offers a host for new VMs, or stops doing so.
pub(crate) fn set_schedulable(
    txn: &mut Txn<'_>,
    request: &Request,
    reference: &Reference,
    schedulable: bool,
) -> Decision {
    let host = request::host(txn.world(), reference)?;
    let (id, changes) = (host.id, host.spec.schedulable != schedulable);
    if changes && !request.dry_run {
        txn.edit_host(id, |host| host.spec.schedulable = schedulable);
        let what = if schedulable {
            "host.schedulable"
        } else {
            "host.unschedulable"
        };
        txn.notice_host(id, what, String::new());
    }
    Ok(Outcome::Done)
}

/// Removes a host on which no VM is.
pub(crate) fn remove(txn: &mut Txn<'_>, request: &Request, reference: &Reference) -> Decision {
    let world = txn.world();
    let host = request::host(world, reference)?.clone();
    let here = |id: &VmId| {
        world.vm(*id).filter(|vm| {
            // Terms that are over name hosts that may be long dead: only a move under way keeps its ends.
            vm.status.host == Some(host.id) || vm.operation.is_some()
        })
    };
    if let Some(vm) = world.index.vms_on(host.id).find_map(|id| here(&id)) {
        let count = world.index.vms_on(host.id).filter(|id| here(id).is_some()).count();
        let message = format!("host {} still has {count} VMs, {} among them", host.name, vm.name);
        let hint = match host.status.link {
            Link::Up => "move or delete them first",
            Link::Lost => "let it connect; if its machine is off for good, say so: `godwit host remove --force`",
        };
        return Err(refuse(Code::WrongState, message, hint));
    }
    // Removing a lost host says that it is gone for good: what it may still have of a VM counts as cleared. One that is
    // connected can tell by itself.
    if host.status.link == Link::Up
        && let Some(vm) = world.index.vms_on(host.id).find_map(|id| world.vm(id))
    {
        let message = format!(
            "host {} has not yet cleared away an earlier move of VM {}",
            host.name, vm.name
        );
        return Err(refuse(
            Code::Busy,
            message,
            "wait until it has, or stop its agent if it cannot",
        ));
    }
    let orders = world.outbox.range((host.id, crate::subject_min())..);
    let orders: Vec<Key> = orders
        .take_while(|((of, _), _)| *of == host.id)
        .map(|((of, subject), _)| Key::Outbox(*of, *subject))
        .collect();
    let imports = crate::templates::imports_of(world, host.id);
    if let Some(template) = imports.first() {
        let message = format!("host {} fetches template {template}", host.name);
        return Err(refuse(Code::Busy, message, "wait until the template is ready"));
    }
    if request.dry_run {
        return Ok(Outcome::Done);
    }
    let id = Fresh::of(request).operation(world)?;
    let residual: Vec<VmId> = world.index.vms_on(host.id).collect();
    for &vm in &residual {
        txn.edit_vm(vm, |vm| vm.status.cleared.extend([host.id]));
        reconcile::settle_terms(txn, vm);
    }
    orders.into_iter().for_each(|key| txn.delete(key));
    see_pools(txn, host.id, &[]);
    txn.notice_host(host.id, "host.removed", String::new());
    txn.delete(Key::Host(host.id));
    for vm in residual {
        stranded::begin(txn, vm);
    }
    let target = target(TargetKind::Host, host.id.0, &host.name);
    request::done(txn, request, id, OperationKind::RemoveHost, target)
}

/// A host's agent connected. The controller sends the outbox; facts and inventory follow.
pub(crate) fn connected(txn: &mut Txn<'_>, host: HostId) {
    txn.transient().connected.insert(host);
    set_link(txn, host, Link::Up, "");
}

/// A host's agent is gone: an alarm. Its VMs may well run, and stay as they were seen.
pub(crate) fn disconnected(txn: &mut Txn<'_>, host: HostId) {
    txn.transient().connected.remove(&host);
    let detail = "its agent is not connected; its VMs are left as they are. Look at the host and its network";
    set_link(txn, host, Link::Lost, detail);
}

fn set_link(txn: &mut Txn<'_>, host: HostId, link: Link, detail: &str) {
    let now = txn.now;
    if txn.world().host(host).is_none_or(|row| row.status.link == link) {
        return;
    }
    txn.edit_host(host, |row| {
        row.status.link = link;
        row.status.since = now;
    });
    let what = match link {
        Link::Up => "host.up",
        Link::Lost => "host.lost",
    };
    txn.notice_host(host, what, detail.to_owned());
}

/// What a host is and offers. A new boot id says that nothing of an older boot runs there.
pub(crate) fn facts(txn: &mut Txn<'_>, host: HostId, facts: &HostFacts) {
    let Some(row) = txn.world().host(host) else { return };
    let before = row.status.facts.as_ref().map(|facts| facts.boot);
    let rebooted = before.is_some_and(|boot| boot != facts.boot);
    see_pools(txn, host, &facts.pools);
    txn.edit_host(host, |row| row.status.facts = Some(facts.clone()));
    if rebooted {
        txn.notice_host(host, "host.rebooted", String::new());
        let vms: Vec<VmId> = txn.world().index.vms_on(host).collect();
        for vm in vms {
            reports::host_rebooted(txn, host, vm);
        }
    }
}

/// Which pools a host sees now: new ones get a row, named by the first to bring them.
pub(crate) fn see_pools(txn: &mut Txn<'_>, host: HostId, seen: &[PoolFacts]) {
    let seen: BTreeMap<PoolId, &Name> = seen.iter().map(|pool| (pool.id, &pool.name)).collect();
    let world = txn.world();
    let known = world
        .pools
        .values()
        .filter(|pool| pool.hosts.contains(&host) != seen.contains_key(&pool.id));
    let changed: Vec<Pool> = known.cloned().collect();
    for mut pool in changed {
        if !pool.hosts.remove(&host) {
            pool.hosts.insert(host);
        }
        if pool.hosts.is_empty() && !is_used(txn.world(), pool.id) {
            txn.delete(Key::Pool(pool.id));
        } else {
            txn.put(Row::Pool(pool));
        }
    }
    for (id, wish) in seen {
        if txn.world().pools.contains_key(&id) {
            continue;
        }
        let name = request::unique(wish, |name| txn.world().index.pool_names.contains_key(name));
        txn.put(Row::Pool(Pool {
            id,
            name,
            driver: PoolDriver::Dir,
            hosts: BTreeSet::from([host]),
            failure_domain: None,
        }));
    }
}

/// Forgets a pool that no host sees, once nothing is in it any more.
pub(crate) fn forget_pool(txn: &mut Txn<'_>, pool: PoolId) {
    let unseen = txn.world().pools.get(&pool).is_some_and(|pool| pool.hosts.is_empty());
    if unseen && !is_used(txn.world(), pool) {
        txn.delete(Key::Pool(pool));
    }
}

fn is_used(world: &crate::World, pool: PoolId) -> bool {
    let volumes = world
        .index
        .in_pool
        .range((pool, model::VolumeId(crate::world::uuid_min()))..);
    let volume = volumes.take(1).any(|(of, _)| *of == pool);
    volume
        || world
            .templates
            .values()
            .any(|row| row.state.touched().any(|touched| touched == pool))
}

/// All VMs that an agent knows, of those above the first bound and up to the second. What it says of each goes the way of a report; what
/// it does not mention is looked at too.
pub(crate) fn inventory(
    txn: &mut Txn<'_>,
    host: HostId,
    seen: &[VmObserved],
    (after, up_to): (Option<VmId>, Option<VmId>),
) {
    for observed in seen {
        reports::observed(txn, host, observed);
    }
    let covered = |vm: VmId| after.is_none_or(|after| vm > after) && up_to.is_none_or(|up_to| vm <= up_to);
    let mentioned: BTreeSet<VmId> = seen.iter().map(|observed| observed.vm).collect();
    let silent: Vec<VmId> = txn
        .world()
        .index
        .vms_on(host)
        .filter(|vm| covered(*vm) && !mentioned.contains(vm))
        .collect();
    for vm in silent {
        reports::not_mentioned(txn, host, vm);
    }
}

/// Tells people, at most once a minute and host, that a report was ignored.
pub(crate) fn complain(txn: &mut Txn<'_>, host: HostId, detail: String) {
    let now = txn.now;
    let last = txn.transient().complained.get(&host).copied();
    if last.is_some_and(|last| now < last.after(COMPLAINT_EVERY) && now >= last) {
        return;
    }
    txn.transient().complained.insert(host, now);
    txn.notice_host(host, "host.report-ignored", detail);
}
