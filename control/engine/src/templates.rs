//! Templates: a host fetches and vets their blobs; they go when no VM is made from them.
//!
//! ```text
//!   import ──▶ one pool has it ──▶ a VM goes to another pool: that is `fetching`, its host brings the blobs, which a holder lends
//!                  Ready ◀────────── the VM runs, or its container waits: that pool has it too
//!   delete ──▶ one order to a host of each pool that may have any; the last answer takes the template out of the world
//! ```

use std::collections::{BTreeMap, BTreeSet};

use model::{
    Code, HostId, Key, Millis, Name, Operation, OperationId, OperationKind, OperationState, Order, Outcome, PoolId,
    Refusal, Request, Row, Template, TemplateId, VmId,
    name::Reference,
    operation::TargetKind,
    order::{Holder, Lend, PoolBlobs, Subject, TemplateOrder, TemplateReport, TemplateSource, TemplateVerb},
    storage::Digest,
    template::{Boot, Content, IMPORT_MAX, Seed, TemplateState},
};
use uuid::Uuid;

use crate::{
    hosts, lifecycle,
    placement::{self, FromTemplate},
    request::{self, Decision, Fresh, refuse},
    txn::{Txn, target},
    world::World,
};

/// How long dropping blobs may take.
const DROP_MAX: Millis = Millis::seconds(120);
/// Longest kernel command line, bytes: Linux takes 2048, and Godwit appends its own words.
const CMDLINE_MAX: usize = 1536;
/// Largest blob or disk, bytes.
const BYTES_MAX: u64 = 64 << 40;
/// Most memory that a template may ask for, MiB.
const MEMORY_MAX_MIB: u64 = 1 << 20;
/// Most hosts that are told to lend a template's blobs to one that lacks them.
const HOLDERS_MAX: usize = 3;
/// On behalf of none: what came too late is dropped again.
const LATE: OperationId = OperationId(Uuid::nil());

/// Makes a template: a connected host with the most shared pool fetches its blobs.
pub(crate) fn create(txn: &mut Txn<'_>, request: &Request, name: &Name, content: &Content) -> Decision {
    let world = txn.world();
    let project = request.actor.project;
    if world.index.template_names.contains_key(&(project, name.clone())) {
        let message = format!("there is a template {name} in this project already");
        return Err(refuse(
            Code::NameTaken,
            message,
            "choose another name, or delete that one",
        ));
    }
    vet(name, content)?;
    let (host, pool) = importer(world).ok_or_else(|| {
        let message = format!("template {name} cannot be imported: no connected host sees a pool");
        refuse(
            Code::HostUnreachable,
            message,
            "let a host join: `godwit host add-token`",
        )
    })?;
    if let Some(dropper) = dropping_from(world, pool) {
        let by = lifecycle::host_name(world, dropper);
        let message = format!("template {name} cannot be imported yet: {by} still removes blobs from its pool");
        let hint = format!("wait until {by} has; remove that host if it is gone for good");
        return Err(refuse(Code::Busy, message, hint));
    }
    if request.dry_run {
        return Ok(Outcome::Done);
    }
    let mut fresh = Fresh::of(request);
    let operation = fresh.operation(world)?;
    let id: TemplateId = fresh.next()?;
    if world.templates.contains_key(&id) {
        return Err(refuse(
            Code::InvalidInput,
            "the request's fresh ids are not fresh",
            "send it again",
        ));
    }
    txn.put(Row::Template(Box::new(Template {
        id,
        project,
        name: name.clone(),
        content: content.clone(),
        state: TemplateState::Importing,
        created_at: txn.now,
    })));
    txn.notice_template(id, "template.importing", String::new());
    let target = target(TargetKind::Template, id.0, name);
    let begun = request::begun(
        request,
        operation,
        OperationKind::ImportTemplate,
        target,
        txn.now,
        IMPORT_MAX,
    );
    txn.begin_operation(begun);
    let content = content.clone();
    order(txn, host, operation, id, pool, TemplateVerb::Fetch { content });
    request::outcome(txn, operation)
}

fn vet(name: &Name, content: &Content) -> Result<(), Box<Refusal>> {
    let invalid = |what: &str, hint: &str| Err(refuse(Code::InvalidInput, format!("template {name}: {what}"), hint));
    if let Boot::Direct { cmdline, .. } = &content.boot
        && (cmdline.len() > CMDLINE_MAX || !cmdline.bytes().all(|byte| (0x20..0x7f).contains(&byte)))
    {
        return invalid(
            "the kernel command line is not plain text of at most 1536 bytes",
            "shorten it",
        );
    }
    if content.boot == Boot::Bios && content.disk.is_none() {
        return invalid("it has neither a kernel nor a disk", "give it a disk to start from");
    }
    if content.seed != Seed::None && content.disk.is_none() {
        return invalid(
            "its guests take a seed and it has no disk, beside which that would lie",
            "give it a disk, or no seed",
        );
    }
    if content
        .blobs()
        .any(|blob| blob.size_bytes == 0 || blob.size_bytes > BYTES_MAX)
    {
        return invalid("a blob is empty or larger than 64 TiB", "look at the files");
    }
    if content
        .disk
        .is_some_and(|disk| disk.size_bytes == 0 || disk.size_bytes > BYTES_MAX)
    {
        return invalid("its disk is empty or larger than 64 TiB", "look at the image");
    }
    if content.memory_mib_min > MEMORY_MAX_MIB {
        return invalid("it asks for more than 1 TiB of memory", "lower the least memory");
    }
    Ok(())
}

/// The connected host with the most shared pool. Equal ones: the lowest ids.
fn importer(world: &World) -> Option<(HostId, PoolId)> {
    let up = |pool: &model::Pool| pool.hosts.iter().copied().find(|host| lifecycle::is_up(world, *host));
    let usable = world.pools.values().filter_map(|pool| Some((up(pool)?, pool)));
    let widest = usable.max_by_key(|(_, pool)| (pool.hosts.len(), std::cmp::Reverse(pool.id)));
    widest.map(|(host, pool)| (host, pool.id))
}

fn order(
    txn: &mut Txn<'_>,
    host: HostId,
    operation: OperationId,
    template: TemplateId,
    pool: PoolId,
    verb: TemplateVerb,
) {
    let epoch = txn.transient().epoch;
    let order = TemplateOrder {
        epoch,
        operation,
        template,
        pool,
        verb,
    };
    txn.send_kept(host, Order::Template(order));
}

/// Deletes a template from which no VM is made, and its blobs that no other has.
pub(crate) fn delete(txn: &mut Txn<'_>, request: &Request, reference: &Reference) -> Decision {
    let world = txn.world();
    let template = request::template(world, &request.actor, reference)?;
    let (id, name) = (template.id, template.name.clone());
    let of = world.index.of_template.range((id, VmId(crate::world::uuid_min()))..);
    let mut of = of.take_while(|(of, _)| *of == id);
    if let Some(vm) = of.next().and_then(|(_, vm)| world.vm(*vm)) {
        let message = format!("template {name} is in use: VM {} is made from it", vm.name);
        return Err(refuse(Code::WrongState, message, "delete its VMs first"));
    }
    let running = world
        .index
        .running
        .range((TargetKind::Template, id.0, OperationId(crate::world::uuid_min()))..);
    if let Some((.., held)) = running
        .take(1)
        .find(|(kind, of, _)| *kind == TargetKind::Template && *of == id.0)
    {
        let message = format!("template {name} is held by operation {held}");
        return Err(refuse(
            Code::Busy,
            message,
            format!("wait for it: `godwit op wait {held}`"),
        ));
    }
    let droppers = droppers(world, template)?;
    if request.dry_run {
        return Ok(Outcome::Done);
    }
    let operation = Fresh::of(request).operation(world)?;
    let target = target(TargetKind::Template, id.0, &name);
    if droppers.is_empty() {
        erase(txn, id);
        return request::done(txn, request, operation, OperationKind::DeleteTemplate, target);
    }
    txn.edit_template(id, |template| template.state = TemplateState::Deleting);
    txn.notice_template(id, "template.deleting", String::new());
    let begun = request::begun(
        request,
        operation,
        OperationKind::DeleteTemplate,
        target,
        txn.now,
        DROP_MAX,
    );
    txn.begin_operation(begun);
    for (host, first, others) in droppers {
        let (pool, blobs) = (first.pool, first.blobs);
        order(txn, host, operation, id, pool, TemplateVerb::Drop { blobs, others });
    }
    request::outcome(txn, operation)
}

/// A host, one of its pools with what goes from it, and its further pools.
type Dropper = (HostId, PoolBlobs, Vec<PoolBlobs>);

/// The hosts that drop the blobs, each with its pools and what goes from them; none when none are anywhere.
fn droppers(world: &World, template: &Template) -> Result<Vec<Dropper>, Box<Refusal>> {
    let mut pools: BTreeSet<PoolId> = template.state.touched().collect();
    if let TemplateState::Failed { pool: None, .. } = template.state {
        // An older build did not say; imports go where this is.
        pools.extend(importer(world).map(|(_, pool)| pool));
    }
    let mut of_hosts: BTreeMap<HostId, Vec<PoolBlobs>> = BTreeMap::new();
    // In a pool that no host sees any more there is nothing left to drop.
    let pools = pools.iter().filter_map(|id| world.pools.get(id));
    for pool in pools.filter(|pool| !pool.hosts.is_empty()) {
        let blobs = own_blobs(world, template.id, pool.id, &template.content);
        if blobs.is_empty() {
            continue;
        }
        if let Some(importing) = imported_into(world, pool.id) {
            let name = &template.name;
            let message =
                format!("template {name} cannot be deleted while template {importing} is imported into its pool");
            return Err(refuse(Code::Busy, message, "wait until that one is ready"));
        }
        let host = pool.hosts.iter().copied().find(|host| lifecycle::is_up(world, *host));
        let host = host.ok_or_else(|| {
            let message = format!("template {}: no connected host sees pool {}", template.name, pool.name);
            refuse(
                Code::HostUnreachable,
                message,
                "let a host of that pool connect, then ask again",
            )
        })?;
        of_hosts
            .entry(host)
            .or_default()
            .push(PoolBlobs { pool: pool.id, blobs });
    }
    let split = of_hosts.into_iter().filter_map(|(host, mut pools)| {
        let others = pools.split_off(1);
        Some((host, pools.pop()?, others))
    });
    Ok(split.collect())
}

/// A template's blobs, and the hosts that lend them to one that lacks them.
pub(crate) fn source(world: &World, template: &Template, pool: PoolId, to: HostId) -> TemplateSource {
    TemplateSource {
        name: template.name.clone(),
        blobs: template.content.blobs().collect(),
        holders: holders(world, template, pool, to)
            .into_iter()
            .map(|(holder, _)| holder)
            .collect(),
    }
}

/// Connected hosts that see another pool which has the template, each with one such pool; none where this pool has it.
fn holders(world: &World, template: &Template, pool: PoolId, to: HostId) -> Vec<(Holder, PoolId)> {
    let holding = template.state.holding();
    if holding.contains(&pool) {
        return Vec::new();
    }
    let pools = holding.iter().filter_map(|id| world.pools.get(id));
    let seen = pools.flat_map(|pool| pool.hosts.iter().map(|host| (*host, pool.id)));
    let up = seen.filter(|(host, _)| *host != to && lifecycle::is_up(world, *host));
    let known = up.filter_map(|(host, pool)| {
        let facts = world.host(host)?.status.facts.as_ref()?;
        let (address, peer_port) = (facts.address, facts.peer_port);
        let holder = Holder {
            host,
            address,
            peer_port,
        };
        Some((host, (holder, pool)))
    });
    let each: BTreeMap<HostId, (Holder, PoolId)> = known.collect();
    each.into_values().take(HOLDERS_MAX).collect()
}

/// A host is about to be ordered to make or take in a VM in a pool: where that lacks the template, it is noted that it may soon hold
/// parts of it, and those that have it are told to lend it. Idempotent; to be called before the order is sent.
pub(crate) fn bring(txn: &mut Txn<'_>, id: TemplateId, pool: PoolId, to: HostId) {
    let world = txn.world();
    let Some(template) = world.template(id) else { return };
    if template.state.holding().contains(&pool) {
        return;
    }
    let mut blobs: Vec<Digest> = template.content.blobs().map(|blob| blob.digest).collect();
    blobs.dedup();
    let holders = holders(world, template, pool, to);
    txn.edit_template(id, |template| {
        if let TemplateState::Ready { fetching, .. } = &mut template.state
            && !fetching.contains(&pool)
        {
            fetching.push(pool);
        }
    });
    for (holder, pool) in holders {
        let lend = Lend {
            epoch: txn.transient().epoch,
            template: id,
            pool,
            to,
            blobs: blobs.clone(),
        };
        txn.send(holder.host, Order::Lend(lend));
    }
}

/// How long what makes a VM in a pool may take: longer where the template is brought there first.
pub(crate) fn allowed(world: &World, id: TemplateId, pool: PoolId, allowed: Millis) -> Millis {
    let has = world
        .template(id)
        .is_some_and(|row| row.state.holding().contains(&pool));
    if has { allowed } else { Millis(allowed.0 + IMPORT_MAX.0) }
}

/// A VM runs, or its container waits: the pool that it was made in has the whole template.
pub(crate) fn arrived(txn: &mut Txn<'_>, vm: VmId, host: HostId) {
    let world = txn.world();
    let Some((vm, host)) = world.vm(vm).zip(world.host(host)) else {
        return;
    };
    let id = vm.spec.template;
    let disk = vm.volumes.first().and_then(|id| world.volumes.get(id));
    let from = FromTemplate { id, only: None };
    let pool = match disk {
        Some(disk) => Some(disk.pool),
        None => placement::pool(world, host, from).ok().map(|pool| pool.id),
    };
    if let Some(pool) = pool {
        arrived_in(txn, id, pool);
    }
}

/// A pool has the whole template, by the word of a host that was told to bring it there.
pub(crate) fn arrived_in(txn: &mut Txn<'_>, id: TemplateId, pool: PoolId) {
    txn.edit_template(id, |template| {
        if let TemplateState::Ready { pools, fetching } = &mut template.state
            && let Some(at) = fetching.iter().position(|fetched| *fetched == pool)
        {
            fetching.remove(at);
            pools.push(pool);
        }
    });
}

/// The template that a host imports into a pool now, if any. What its disk becomes is not known before it is there, so no blob of
/// that pool may go meanwhile: it might be the same one.
fn imported_into(world: &World, pool: PoolId) -> Option<String> {
    let importing = world
        .templates
        .values()
        .filter(|row| row.state == TemplateState::Importing);
    let fetched = |id: TemplateId| {
        let hosts = world.pools.get(&pool).into_iter().flat_map(|pool| &pool.hosts);
        hosts
            .filter_map(|host| waiting(world, *host, id))
            .any(|order| order.pool == pool)
    };
    let mut here = importing.filter(|row| fetched(row.id));
    here.next().map(|row| row.name.to_string())
}

/// The host that has yet to say that it dropped blobs from a pool, if any. What comes in meanwhile might be among them, and would be
/// taken for there.
pub(crate) fn dropping_from(world: &World, pool: PoolId) -> Option<HostId> {
    let from_there = |order: &Order| {
        let Order::Template(order) = order else { return false };
        let TemplateVerb::Drop { others, .. } = &order.verb else {
            return false;
        };
        order.pool == pool || others.iter().any(|other| other.pool == pool)
    };
    let hosts = world.pools.get(&pool).into_iter().flat_map(|pool| &pool.hosts);
    hosts.copied().find(|host| {
        let first = Subject::Template(TemplateId(crate::world::uuid_min()));
        let rows = world.outbox.range((*host, first)..);
        let mut rows = rows.take_while(|((of, _), _)| of == host);
        rows.any(|(_, row)| from_there(&row.order))
    })
}

/// Those of a template's blobs that no other template may have in that pool.
fn own_blobs(world: &World, template: TemplateId, pool: PoolId, content: &Content) -> Vec<Digest> {
    let others = world.templates.values().filter(|other| other.id != template);
    let may_be_here = |other: &&Template| match &other.state {
        state @ (TemplateState::Ready { .. } | TemplateState::Failed { pool: Some(_), .. }) => {
            state.touched().any(|touched| touched == pool)
        }
        // Where it is, or goes, is not written down.
        _ => true,
    };
    let kept: BTreeSet<Digest> = others
        .filter(|other| may_be_here(&&***other))
        .flat_map(|other| other.content.blobs())
        .map(|blob| blob.digest)
        .collect();
    let mut own: Vec<Digest> = content.blobs().map(|blob| blob.digest).collect();
    own.retain(|digest| !kept.contains(digest));
    own.sort_unstable();
    own.dedup();
    own
}

/// The order about a template that a host has not answered.
fn waiting(world: &World, host: HostId, template: TemplateId) -> Option<&TemplateOrder> {
    let row = world.outbox.get(&(host, Subject::Template(template)))?;
    match &row.order {
        Order::Template(order) => Some(order),
        _ => None,
    }
}

/// What became of an order about a template. Counts only from the host that was ordered.
pub(crate) fn report(txn: &mut Txn<'_>, host: HostId, report: &TemplateReport) {
    let order = waiting(txn.world(), host, report.template);
    let Some(order) = order
        .filter(|order| order.operation == report.operation && order.pool == report.pool)
        .cloned()
    else {
        return late(txn, host, report);
    };
    let id = report.template;
    txn.delete(Key::Outbox(host, Subject::Template(id)));
    if order.operation == LATE {
        return;
    }
    match (&order.verb, &report.refused) {
        (TemplateVerb::Fetch { .. }, None) => {
            let pools = vec![report.pool];
            let disk = report.content.as_ref().and_then(|content| content.disk);
            txn.edit_template(id, |template| {
                // Only the disk's file changes when it is converted: what its guest sees, and how it starts, was asked for.
                if let (Some(asked), Some(converted)) = (&mut template.content.disk, disk) {
                    asked.blob = converted.blob;
                    asked.format = converted.format;
                    asked.size_bytes = converted.size_bytes.clamp(1, BYTES_MAX);
                }
                template.state = TemplateState::Ready {
                    pools,
                    fetching: Vec::new(),
                };
            });
            txn.notice_template(id, "template.ready", String::new());
            txn.finish(order.operation, OperationState::Succeeded);
        }
        (TemplateVerb::Drop { .. }, None) if !orders_of(txn.world(), id, order.operation).is_empty() => {}
        (TemplateVerb::Drop { .. }, None) => {
            erase(txn, id);
            txn.finish(order.operation, OperationState::Succeeded);
        }
        (_, Some(reason)) => failed(txn, id, order.operation, pools_of(&order), reason.clone()),
    }
}

/// An import succeeded after it was given up: what it made is dropped, unless it is used or may be about to be.
fn late(txn: &mut Txn<'_>, host: HostId, report: &TemplateReport) {
    let world = txn.world();
    let (Some(content), None) = (&report.content, &report.refused) else {
        return;
    };
    let given_up = world
        .template(report.template)
        .is_none_or(|row| matches!(row.state, TemplateState::Failed { .. }));
    let sees = world
        .pools
        .get(&report.pool)
        .is_some_and(|pool| pool.hosts.contains(&host));
    let busy = waiting(world, host, report.template).is_some() || imported_into(world, report.pool).is_some();
    if !given_up || !sees || busy {
        return;
    }
    let blobs = own_blobs(world, report.template, report.pool, content);
    if !blobs.is_empty() {
        order(
            txn,
            host,
            LATE,
            report.template,
            report.pool,
            TemplateVerb::Drop {
                blobs,
                others: Vec::new(),
            },
        );
    }
}

/// The pools that an order is about.
fn pools_of(order: &TemplateOrder) -> Vec<PoolId> {
    let others = match &order.verb {
        TemplateVerb::Drop { others, .. } => others.as_slice(),
        TemplateVerb::Fetch { .. } => &[],
    };
    std::iter::once(order.pool)
        .chain(others.iter().map(|other| other.pool))
        .collect()
}

/// The orders of an operation that hosts have not answered.
fn orders_of(world: &World, id: TemplateId, operation: OperationId) -> Vec<(HostId, TemplateOrder)> {
    let orders = world
        .hosts
        .keys()
        .filter_map(|host| Some((*host, waiting(world, *host, id)?)));
    let orders = orders.filter(|(_, order)| order.operation == operation);
    orders.map(|(host, order)| (host, order.clone())).collect()
}

/// `pools` may hold some of its blobs, and so may those of which other hosts have not told: they are not waited for.
fn failed(txn: &mut Txn<'_>, id: TemplateId, operation: OperationId, mut pools: Vec<PoolId>, reason: Refusal) {
    for (host, order) in orders_of(txn.world(), id, operation) {
        pools.extend(pools_of(&order));
        txn.delete(Key::Outbox(host, Subject::Template(id)));
    }
    pools.sort_unstable();
    pools.dedup();
    let others = pools.split_off(pools.len().min(1));
    let pool = pools.pop();
    let state = TemplateState::Failed {
        reason: reason.clone(),
        pool,
        others,
    };
    txn.edit_template(id, |template| template.state = state);
    txn.notice_template(id, "template.failed", reason.message.clone());
    txn.fail(operation, reason);
}

/// The operation of a template is out of time: its order is taken back.
pub(crate) fn expire(txn: &mut Txn<'_>, operation: &Operation) {
    let id = TemplateId(operation.target.id);
    let world = txn.world();
    let host = orders_of(world, id, operation.id).first().map(|(host, _)| *host);
    let by = host.map_or_else(|| "its host".to_owned(), |host| lifecycle::host_name(world, host));
    let message = format!(
        "{} of template {}: {by} did not finish in time",
        operation.kind.name(),
        operation.target.name
    );
    let hint = format!(
        "look at that host; `godwit template delete {}`, then import it again",
        operation.target.name
    );
    let reason = Refusal::new(Code::TimedOut, message).hint(hint);
    failed(txn, id, operation.id, Vec::new(), reason);
}

/// Names of the templates about which a host has an order.
pub(crate) fn imports_of(world: &World, host: HostId) -> Vec<Name> {
    let rows = world
        .outbox
        .range((host, Subject::Template(TemplateId(crate::world::uuid_min())))..);
    let rows = rows.take_while(|((of, _), _)| *of == host);
    let rows = rows.filter(|(_, row)| !matches!(&row.order, Order::Template(order) if order.operation == LATE));
    rows.filter_map(|((_, subject), _)| match subject {
        Subject::Template(id) => world.template(*id).map(|template| template.name.clone()),
        Subject::Vm(_) | Subject::Port(_) => None,
    })
    .collect()
}

/// A host was given up: what it was to do for templates will not be done.
pub(crate) fn abandon(txn: &mut Txn<'_>, host: HostId) {
    let rows = txn.world().outbox.range((host, crate::subject_min())..);
    let rows = rows.take_while(|((of, _), _)| *of == host);
    let orders = rows.filter_map(|(_, row)| match &row.order {
        Order::Template(order) if order.operation != LATE => Some((order.template, order.operation, pools_of(order))),
        _ => None,
    });
    let orders: Vec<(TemplateId, OperationId, Vec<PoolId>)> = orders.collect();
    let name = lifecycle::host_name(txn.world(), host);
    for (id, operation, pools) in orders {
        let message = format!("host {name} was removed before it had done its part");
        let reason = Refusal::new(Code::HostUnreachable, message).hint("delete the template, then import it again");
        failed(txn, id, operation, pools, reason);
    }
}

/// Takes a template out of the world, and pools that only it kept.
fn erase(txn: &mut Txn<'_>, id: TemplateId) {
    let unseen = txn.world().pools.values().filter(|pool| pool.hosts.is_empty());
    let unseen: Vec<PoolId> = unseen.map(|pool| pool.id).collect();
    txn.notice_template(id, "template.deleted", String::new());
    txn.delete(Key::Template(id));
    unseen.into_iter().for_each(|pool| hosts::forget_pool(txn, pool));
}
