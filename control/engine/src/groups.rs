//! Security groups: made, changed at once for all their ports, and deleted.

use model::{
    Code, Key, Name, Outcome, Refusal, Request, SecurityGroup, SecurityGroupId,
    access::Actor,
    name::Reference,
    policy::{Direction, NewRule, Protocol, RULES_MAX, Remote, SecurityRule},
};

use crate::{
    ports,
    request::{Decision, Fresh, refuse},
    txn::Txn,
    world::World,
};

/// Most security groups of a project.
const GROUPS_MAX: usize = 200;
/// Most rules of a group that speak of a group's ports: each becomes as many addresses.
const REMOTE_GROUPS_MAX: usize = 10;

/// The group that is meant, in the actor's project.
pub(crate) fn find<'w>(
    world: &'w World,
    actor: &Actor,
    reference: &Reference,
) -> Result<&'w SecurityGroup, Box<Refusal>> {
    let id = match reference {
        Reference::Id(id) => Some(SecurityGroupId(*id)),
        Reference::Name(name) => {
            let key = (actor.project, name.clone());
            world.index.security_group_names.get(&key).copied()
        }
    };
    id.and_then(|id| world.security_groups.get(&id))
        .map(|group| &**group)
        .filter(|group| group.project == actor.project)
        .ok_or_else(|| {
            let message = format!("there is no security group {reference} in this project");
            let hint = "`godwit security-group list` shows what there is";
            refuse(Code::NotFound, message, hint)
        })
}

/// Makes a group, which allows its ports to begin what they like and nobody to begin anything with them.
pub(crate) fn create(txn: &mut Txn<'_>, request: &Request, name: &Name) -> Decision {
    let (world, project) = (txn.world(), request.actor.project);
    if world.index.security_group_names.contains_key(&(project, name.clone())) {
        let message = format!("there is a security group {name} in this project already");
        return Err(refuse(Code::NameTaken, message, "choose another name"));
    }
    let first = (project, SecurityGroupId(crate::world::uuid_min()));
    let groups = world.index.security_groups.range(first..);
    if groups.take_while(|(of, _)| *of == project).count() >= GROUPS_MAX {
        let message = format!("the project has {GROUPS_MAX} security groups, which is as many as it takes");
        return Err(refuse(Code::NoCapacity, message, "delete groups that nobody uses"));
    }
    let mut fresh = Fresh::of(request);
    let id = loop {
        let id: SecurityGroupId = fresh.next()?;
        if !world.security_groups.contains_key(&id) {
            break id;
        }
    };
    if !request.dry_run {
        let everything = SecurityRule {
            number: 1,
            direction: Direction::Egress,
            protocol: Protocol::Any,
            ports: None,
            remote: Remote::Any,
        };
        ports::put_group(
            txn,
            SecurityGroup {
                id,
                project,
                name: name.clone(),
                rules: vec![everything],
                next_rule: 2,
            },
        );
    }
    Ok(Outcome::Done)
}

/// Deletes a group that nobody uses.
pub(crate) fn delete(txn: &mut Txn<'_>, request: &Request, reference: &Reference) -> Decision {
    let world = txn.world();
    let group = find(world, &request.actor, reference)?;
    let (id, name) = (group.id, group.name.clone());
    let ports = world.index.ports_in(id).count();
    if ports > 0 {
        let message = format!("security group {name} is used by {ports} ports");
        let hint = "take them out first: `godwit port set PORT --security-group OTHER`, or --no-security-group";
        return Err(refuse(Code::WrongState, message, hint));
    }
    let naming = world.index.groups_that_name(id).find(|other| *other != id);
    if let Some(other) = naming.and_then(|other| world.security_groups.get(&other)) {
        let message = format!("a rule of security group {} speaks of {name}", other.name);
        return Err(refuse(Code::WrongState, message, "remove that rule first"));
    }
    if !request.dry_run {
        txn.delete(Key::SecurityGroup(id));
    }
    Ok(Outcome::Done)
}

/// Adds a rule; one that is there already is added no second time.
pub(crate) fn add_rule(txn: &mut Txn<'_>, request: &Request, reference: &Reference, wanted: &NewRule) -> Decision {
    let world = txn.world();
    let mut group = find(world, &request.actor, reference)?.clone();
    let rule = rule(world, &request.actor, &group, wanted)?;
    let same = |known: &SecurityRule| {
        SecurityRule {
            number: 0,
            ..known.clone()
        } == rule
    };
    if request.dry_run || group.rules.iter().any(same) {
        return Ok(Outcome::Done);
    }
    group.rules.push(SecurityRule {
        number: group.next_rule,
        ..rule
    });
    group.next_rule = group.next_rule.saturating_add(1);
    ports::put_group(txn, group);
    Ok(Outcome::Done)
}

/// A rule without a number, if it makes sense and there is room for it.
fn rule(world: &World, actor: &Actor, group: &SecurityGroup, wanted: &NewRule) -> Result<SecurityRule, Box<Refusal>> {
    let invalid = |message: String, hint: &str| Err(refuse(Code::InvalidInput, message, hint));
    if wanted.ports.is_some() && !wanted.protocol.has_ports() {
        let message = format!("{} has no ports", wanted.protocol);
        return invalid(message, "leave the ports out, or give the protocol tcp or udp");
    }
    let remote = match (&wanted.remote, &wanted.remote_group) {
        (Some(_), Some(_)) => {
            let message = "a rule speaks of addresses or of a group, not of both".to_owned();
            return invalid(message, "add two rules");
        }
        (Some(range), None) => Remote::Cidr(*range),
        (None, Some(other)) => Remote::Group(find(world, actor, other)?.id),
        (None, None) => Remote::Any,
    };
    let of_groups = group
        .rules
        .iter()
        .filter(|rule| matches!(rule.remote, Remote::Group(_)));
    let full = group.rules.len() >= RULES_MAX
        || (matches!(remote, Remote::Group(_)) && of_groups.count() >= REMOTE_GROUPS_MAX);
    if full {
        let message = format!("security group {} has as many rules as it takes", group.name);
        let hint = "at most 100, 10 of them about groups; use ranges, or a second group";
        return Err(refuse(Code::NoCapacity, message, hint));
    }
    Ok(SecurityRule {
        number: 0,
        direction: wanted.direction,
        protocol: wanted.protocol,
        ports: wanted.ports,
        remote,
    })
}

/// Takes a rule away; one that is gone is gone.
pub(crate) fn remove_rule(txn: &mut Txn<'_>, request: &Request, reference: &Reference, number: u32) -> Decision {
    let mut group = find(txn.world(), &request.actor, reference)?.clone();
    if number == 0 || number >= group.next_rule {
        let message = format!("security group {} never had a rule {number}", group.name);
        let hint = format!("`godwit security-group show {}` shows their numbers", group.name);
        return Err(refuse(Code::NotFound, message, hint));
    }
    let before = group.rules.len();
    group.rules.retain(|rule| rule.number != number);
    if !request.dry_run && group.rules.len() < before {
        ports::put_group(txn, group);
    }
    Ok(Outcome::Done)
}
