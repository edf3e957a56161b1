//! All that an agent needs to build a VM, gathered from the rows.

use model::{
    Definition, Vm,
    order::{PortUse, VolumeBase, VolumePlace, VolumeUse},
};

use crate::{
    placement::{self, FromTemplate},
    ports, templates,
    world::World,
};

/// The definition of a VM for a host. `None` when a row that it refers to is missing, which [`World::load`] excludes.
pub(crate) fn of(world: &World, vm: &Vm, host: model::HostId) -> Option<Definition> {
    let template = world.templates.get(&vm.spec.template)?;
    let volumes: Vec<VolumeUse> = vm
        .volumes
        .iter()
        .map(|id| {
            let volume = world.volumes.get(id)?;
            let format = template.content.disk.map(|disk| disk.format);
            Some(VolumeUse {
                place: VolumePlace {
                    volume: volume.id,
                    pool: volume.pool,
                    format: volume.format,
                },
                size_bytes: volume.size_bytes,
                base: volume
                    .base
                    .zip(format)
                    .map(|(digest, format)| VolumeBase { digest, format }),
            })
        })
        .collect::<Option<_>>()?;
    // The volumes' own pool holds the blobs that they are overlays of.
    let pool = match volumes.first() {
        Some(volume) => volume.place.pool,
        None => {
            let from = FromTemplate {
                id: template.id,
                only: None,
            };
            placement::pool(world, world.host(host)?, from).ok()?.id
        }
    };
    Some(Definition {
        vm: vm.id,
        name: vm.name.clone(),
        layout: vm.layout.clone(),
        boot: template.content.boot.clone(),
        pool,
        volumes,
        ports: vm.ports.iter().map(|id| port(world, *id)).collect::<Option<_>>()?,
        template: Some(templates::source(world, template, pool, host)),
    })
}

/// A port, as its host is told of it.
pub(crate) fn port(world: &World, id: model::PortId) -> Option<PortUse> {
    let port = world.ports.get(&id)?;
    let subnet = world.subnets.get(&port.subnet)?;
    let network = world.networks.get(&port.network)?;
    Some(PortUse {
        port: port.id,
        mac: port.mac,
        ip: port.ip,
        prefix: subnet.prefix,
        gateway: subnet.gateway,
        mtu: network.mtu,
        v6: port.v6,
        addressing: network.addressing.clone(),
        policy: ports::policy(world, port),
    })
}

/// Where a VM's volumes lie.
pub(crate) fn places(world: &World, vm: &Vm) -> Vec<VolumePlace> {
    let volumes = vm.volumes.iter().filter_map(|id| world.volumes.get(id));
    volumes
        .map(|volume| VolumePlace {
            volume: volume.id,
            pool: volume.pool,
            format: volume.format,
        })
        .collect()
}
