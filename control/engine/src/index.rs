//! What is derived from the rows so that no decision walks all of them: names, capacity, addresses, deadlines.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use model::{
    HostId, Mac, Name, NetworkId, OperationId, PoolId, Port, PortId, ProjectId, Role, Row, SecurityGroupId, Subnet,
    SubnetId, TemplateId, Timestamp, TokenId, UserId, Vm, VmId, VolumeId,
    access::{ApiToken, TokenKind},
    operation::TargetKind,
    policy::Remote,
};
use uuid::Uuid;

/// What VMs hold on a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// VMs.
    pub vms: u64,
    /// vCPUs.
    pub vcpus: u64,
    /// Memory, MiB.
    pub memory_mib: u64,
}

/// Everything derived. Kept by [`Index::touch`] alone, which is called for each row that comes and goes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Index {
    pub(crate) project_names: BTreeMap<Name, ProjectId>,
    pub(crate) host_names: BTreeMap<Name, HostId>,
    pub(crate) pool_names: BTreeMap<Name, PoolId>,
    pub(crate) vm_names: BTreeMap<(ProjectId, Name), VmId>,
    pub(crate) template_names: BTreeMap<(ProjectId, Name), TemplateId>,
    pub(crate) network_names: BTreeMap<(ProjectId, Name), NetworkId>,
    pub(crate) vms: BTreeSet<(ProjectId, VmId)>,
    pub(crate) volumes: BTreeSet<(ProjectId, VolumeId)>,
    pub(crate) networks: BTreeSet<(ProjectId, NetworkId)>,
    /// Ports of VMs.
    pub(crate) ports: BTreeSet<(ProjectId, PortId)>,
    pub(crate) security_group_names: BTreeMap<(ProjectId, Name), SecurityGroupId>,
    pub(crate) security_groups: BTreeSet<(ProjectId, SecurityGroupId)>,
    /// Ports in a security group.
    pub(crate) grouped: BTreeSet<(SecurityGroupId, PortId)>,
    /// Security groups of whose ports a rule of another, or of the group itself, speaks.
    pub(crate) group_remotes: BTreeSet<(SecurityGroupId, SecurityGroupId)>,
    pub(crate) templates: BTreeSet<(ProjectId, TemplateId)>,
    pub(crate) operations: BTreeSet<(ProjectId, OperationId)>,
    pub(crate) subnets: BTreeSet<(NetworkId, SubnetId)>,
    /// VMs that a host holds, held last, or is named by the terms of.
    pub(crate) on_host: BTreeSet<(HostId, VmId)>,
    pub(crate) of_template: BTreeSet<(TemplateId, VmId)>,
    pub(crate) in_pool: BTreeSet<(PoolId, VolumeId)>,
    pub(crate) held: BTreeMap<HostId, Held>,
    pub(crate) macs: BTreeMap<Mac, PortId>,
    pub(crate) free: BTreeMap<SubnetId, FreeAddresses>,
    pub(crate) addresses_used: BTreeMap<NetworkId, u64>,
    /// Running operations on a thing.
    pub(crate) running: BTreeSet<(TargetKind, Uuid, OperationId)>,
    pub(crate) deadlines: BTreeSet<(Timestamp, OperationId)>,
    pub(crate) finished: BTreeSet<(Timestamp, OperationId)>,
    pub(crate) resting: BTreeSet<(Timestamp, PortId)>,
    pub(crate) answered: BTreeSet<(Timestamp, ProjectId, String)>,
    pub(crate) join_expiry: BTreeSet<(Timestamp, TokenId)>,
    pub(crate) api_expiry: BTreeSet<(Timestamp, TokenId)>,
    /// Service tokens of a project.
    service_tokens: BTreeSet<(ProjectId, TokenId)>,
    /// Tokens that use a user's right.
    user_tokens: BTreeSet<(UserId, TokenId)>,
    pub(crate) token_names: BTreeMap<(ProjectId, Name), TokenId>,
    /// Tokens that may do everything, for ever, whoever the users are.
    pub(crate) root_tokens: BTreeSet<TokenId>,
    pub(crate) user_names: BTreeMap<Name, UserId>,
    /// Users with a role in a project.
    project_users: BTreeSet<(ProjectId, UserId)>,
    /// Users who may do everything and come in.
    pub(crate) cloud_admins: BTreeSet<UserId>,
}

/// The hosts on which a VM takes memory and CPU: where it is and, while it moves, both ends.
pub(crate) fn holders(vm: &Vm) -> BTreeSet<HostId> {
    let status = &vm.status;
    let mut hosts = BTreeSet::new();
    if let Some(terms) = &status.moving {
        hosts.extend([terms.source, terms.destination]);
        hosts.retain(|host| !status.cleared.contains(host));
    }
    if status.state.holds_capacity() {
        hosts.extend(status.host);
    }
    hosts
}

/// The hosts that may speak of a VM: the one that holds it or held it last, and those that its terms name.
pub(crate) fn concerned(vm: &Vm) -> BTreeSet<HostId> {
    let mut hosts: BTreeSet<HostId> = vm.status.host.into_iter().collect();
    if let Some(terms) = &vm.status.moving {
        hosts.extend([terms.source, terms.destination]);
    }
    hosts
}

fn set<T: Ord>(set: &mut BTreeSet<T>, item: T, there: bool) {
    if there {
        set.insert(item);
    } else {
        set.remove(&item);
    }
}

fn map<K: Ord, V: PartialEq>(map: &mut BTreeMap<K, V>, key: K, value: V, there: bool) {
    if there {
        map.insert(key, value);
    } else if map.get(&key) == Some(&value) {
        map.remove(&key);
    }
}

impl Index {
    /// A row came, or goes.
    pub(crate) fn touch(&mut self, row: &Row, there: bool) {
        match row {
            Row::Project(row) => map(&mut self.project_names, row.name.clone(), row.id, there),
            Row::Host(row) => map(&mut self.host_names, row.name.clone(), row.id, there),
            Row::Pool(row) => map(&mut self.pool_names, row.name.clone(), row.id, there),
            Row::Volume(row) => {
                set(&mut self.volumes, (row.project, row.id), there);
                set(&mut self.in_pool, (row.pool, row.id), there);
            }
            Row::Network(row) => {
                map(&mut self.network_names, (row.project, row.name.clone()), row.id, there);
                set(&mut self.networks, (row.project, row.id), there);
            }
            Row::Subnet(row) => self.touch_subnet(row, there),
            Row::Port(row) => self.touch_port(row, there),
            Row::Template(row) => {
                map(&mut self.template_names, (row.project, row.name.clone()), row.id, there);
                set(&mut self.templates, (row.project, row.id), there);
            }
            Row::Vm(row) => self.touch_vm(row, there),
            Row::Operation(row) => {
                set(&mut self.operations, (row.project, row.id), there);
                match row.finished_at {
                    None => {
                        set(&mut self.deadlines, (row.ends_by, row.id), there);
                        set(&mut self.running, (row.target.kind, row.target.id, row.id), there);
                    }
                    Some(at) => set(&mut self.finished, (at, row.id), there),
                }
            }
            Row::JoinToken(row) => set(&mut self.join_expiry, (row.expires_at, row.id), there),
            Row::ApiToken(row) => self.touch_token(row, there),
            Row::User(row) => {
                map(&mut self.user_names, row.name.clone(), row.id, there);
                for project in row.grants.keys() {
                    set(&mut self.project_users, (*project, row.id), there);
                }
                if row.cloud_admin && !row.disabled {
                    set(&mut self.cloud_admins, row.id, there);
                }
            }
            Row::Answer(row) => set(&mut self.answered, (row.at, row.project, row.key.clone()), there),
            Row::SecurityGroup(row) => {
                map(
                    &mut self.security_group_names,
                    (row.project, row.name.clone()),
                    row.id,
                    there,
                );
                set(&mut self.security_groups, (row.project, row.id), there);
                for rule in &row.rules {
                    if let Remote::Group(remote) = rule.remote {
                        set(&mut self.group_remotes, (remote, row.id), there);
                    }
                }
            }
            Row::Outbox(_) | Row::Notice(_) | Row::Audit(_) | Row::Seed(_) => {}
        }
    }

    fn touch_subnet(&mut self, row: &Subnet, there: bool) {
        set(&mut self.subnets, (row.network, row.id), there);
        if there {
            self.free.insert(row.id, FreeAddresses::of(row));
        } else {
            self.free.remove(&row.id);
        }
    }

    fn touch_port(&mut self, row: &Port, there: bool) {
        map(&mut self.macs, row.mac, row.id, there);
        if row.vm.is_some() {
            set(&mut self.ports, (row.project, row.id), there);
        }
        for group in &row.spec.groups {
            set(&mut self.grouped, (*group, row.id), there);
        }
        if let Some(free) = self.free.get_mut(&row.subnet) {
            if there {
                free.take(row.ip);
            } else {
                free.give(row.ip);
            }
        }
        let used = self.addresses_used.entry(row.network).or_default();
        *used = if there { *used + 1 } else { used.saturating_sub(1) };
        if let Some(until) = row.rests_until {
            set(&mut self.resting, (until, row.id), there);
        }
    }

    fn touch_vm(&mut self, row: &Vm, there: bool) {
        map(&mut self.vm_names, (row.project, row.name.clone()), row.id, there);
        set(&mut self.vms, (row.project, row.id), there);
        set(&mut self.of_template, (row.spec.template, row.id), there);
        for host in concerned(row) {
            set(&mut self.on_host, (host, row.id), there);
        }
        for host in holders(row) {
            let held = self.held.entry(host).or_default();
            let (vcpus, memory_mib) = (u64::from(row.spec.vcpus), row.spec.memory_mib);
            *held = if there {
                Held {
                    vms: held.vms + 1,
                    vcpus: held.vcpus + vcpus,
                    memory_mib: held.memory_mib + memory_mib,
                }
            } else {
                Held {
                    vms: held.vms.saturating_sub(1),
                    vcpus: held.vcpus.saturating_sub(vcpus),
                    memory_mib: held.memory_mib.saturating_sub(memory_mib),
                }
            };
        }
    }

    fn touch_token(&mut self, row: &ApiToken, there: bool) {
        if let Some(at) = row.expires_at {
            set(&mut self.api_expiry, (at, row.id), there);
        }
        if row.kind == TokenKind::Service {
            set(&mut self.service_tokens, (row.actor.project, row.id), there);
            if let Some(name) = &row.name {
                map(&mut self.token_names, (row.actor.project, name.clone()), row.id, there);
            }
        }
        match row.owner {
            Some(owner) => set(&mut self.user_tokens, (owner, row.id), there),
            None if row.actor.role == Role::CloudAdmin && row.expires_at.is_none() => {
                set(&mut self.root_tokens, row.id, there);
            }
            None => {}
        }
    }

    /// The service tokens of a project.
    pub(crate) fn service_tokens(&self, project: ProjectId) -> impl Iterator<Item = TokenId> + '_ {
        let tokens = self.service_tokens.range((project, TokenId(Uuid::nil()))..);
        tokens.take_while(move |(of, _)| *of == project).map(|&(_, id)| id)
    }

    /// The tokens that use a user's right.
    pub(crate) fn tokens_of(&self, user: UserId) -> impl Iterator<Item = TokenId> + '_ {
        let tokens = self.user_tokens.range((user, TokenId(Uuid::nil()))..);
        tokens.take_while(move |(of, _)| *of == user).map(|&(_, id)| id)
    }

    /// The users with a role in a project, cloud admins aside.
    pub(crate) fn users_of(&self, project: ProjectId) -> impl Iterator<Item = UserId> + '_ {
        let users = self.project_users.range((project, UserId(Uuid::nil()))..);
        users.take_while(move |(of, _)| *of == project).map(|&(_, id)| id)
    }

    /// The ports in a security group.
    pub(crate) fn ports_in(&self, group: SecurityGroupId) -> impl Iterator<Item = PortId> + '_ {
        let ports = self.grouped.range((group, PortId(Uuid::nil()))..);
        ports.take_while(move |(of, _)| *of == group).map(|&(_, id)| id)
    }

    /// The groups with a rule that speaks of a group's ports.
    pub(crate) fn groups_that_name(&self, group: SecurityGroupId) -> impl Iterator<Item = SecurityGroupId> + '_ {
        let groups = self.group_remotes.range((group, SecurityGroupId(Uuid::nil()))..);
        groups.take_while(move |(of, _)| *of == group).map(|&(_, id)| id)
    }

    /// The VMs that concern a host.
    pub(crate) fn vms_on(&self, host: HostId) -> impl Iterator<Item = VmId> + '_ {
        self.on_host
            .range((host, VmId(Uuid::nil()))..)
            .take_while(move |(of, _)| *of == host)
            .map(|&(_, vm)| vm)
    }

    /// The earliest time at which something is due.
    pub(crate) fn next_deadline(&self) -> Option<Timestamp> {
        let day = model::Millis(crate::tick::ANSWER_KEPT.0);
        [
            self.deadlines.first().map(|row| row.0),
            self.resting.first().map(|row| row.0),
            self.join_expiry.first().map(|row| row.0),
            self.api_expiry.first().map(|row| row.0),
            self.answered.first().map(|row| row.0.after(day)),
        ]
        .into_iter()
        .flatten()
        .min()
    }
}

/// The addresses of a subnet that nobody has, as ranges: the lowest is found, and one taken or given back, in logarithmic time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FreeAddresses {
    /// First address of each range, with its last.
    ranges: BTreeMap<u32, u32>,
    /// What the subnet gives out.
    bounds: (u32, u32),
    /// Addresses inside the bounds that are never given: network, broadcast, gateway.
    reserved: BTreeSet<u32>,
}

impl FreeAddresses {
    fn of(subnet: &Subnet) -> Self {
        let bits = u32::from(subnet.address);
        let mask = u32::MAX.checked_shl(32 - u32::from(subnet.prefix.min(32))).unwrap_or(0);
        let (network, broadcast) = (bits & mask, bits | !mask);
        let (first, last) = (u32::from(subnet.first), u32::from(subnet.last));
        let bounds = (first.max(network), last.min(broadcast));
        let mut free = Self {
            ranges: BTreeMap::new(),
            bounds,
            reserved: [network, broadcast]
                .into_iter()
                .chain(subnet.gateway.map(u32::from))
                .collect(),
        };
        if bounds.0 <= bounds.1 {
            free.ranges.insert(bounds.0, bounds.1);
        }
        for address in free.reserved.clone() {
            free.take(Ipv4Addr::from(address));
        }
        free
    }

    /// The lowest free address.
    pub(crate) fn lowest(&self) -> Option<Ipv4Addr> {
        self.ranges.first_key_value().map(|(&first, _)| Ipv4Addr::from(first))
    }

    fn take(&mut self, address: Ipv4Addr) {
        let address = u32::from(address);
        let Some((&first, &last)) = self.ranges.range(..=address).next_back() else {
            return;
        };
        if address > last {
            return;
        }
        self.ranges.remove(&first);
        if first < address {
            self.ranges.insert(first, address - 1);
        }
        if address < last {
            self.ranges.insert(address + 1, last);
        }
    }

    fn give(&mut self, address: Ipv4Addr) {
        let address = u32::from(address);
        if address < self.bounds.0 || address > self.bounds.1 || self.reserved.contains(&address) {
            return;
        }
        let (mut first, mut last) = (address, address);
        if let Some((&before, &end)) = self.ranges.range(..=address).next_back() {
            if end >= address {
                return;
            }
            if end + 1 == address {
                first = before;
            }
        }
        if let Some(after) = address.checked_add(1)
            && let Some(end) = self.ranges.remove(&after)
        {
            last = end;
        }
        self.ranges.insert(first, last);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn subnet() -> Subnet {
        Subnet {
            id: SubnetId(Uuid::from_u128(1)),
            network: NetworkId(Uuid::from_u128(2)),
            address: Ipv4Addr::new(10, 0, 0, 0),
            prefix: 28,
            gateway: Some(Ipv4Addr::new(10, 0, 0, 1)),
            first: Ipv4Addr::new(10, 0, 0, 0),
            last: Ipv4Addr::new(10, 0, 0, 15),
        }
    }

    proptest! {
        #[test]
        fn the_lowest_free_address_is_what_a_plain_set_says(steps in prop::collection::vec((any::<bool>(), 0u32..16), 0..60)) {
            let base = u32::from(subnet().address);
            let mut free = FreeAddresses::of(&subnet());
            let mut plain: BTreeSet<u32> = (base + 2..base + 15).collect();
            let all = plain.clone();
            for (take, offset) in steps {
                let address = base + offset;
                if take {
                    free.take(Ipv4Addr::from(address));
                    plain.remove(&address);
                } else {
                    free.give(Ipv4Addr::from(address));
                    if all.contains(&address) {
                        plain.insert(address);
                    }
                }
                prop_assert_eq!(free.lowest().map(u32::from), plain.first().copied());
            }
        }
    }
}
