//! What hosts and VMs use, for a scrape: the counters as hosts told them last, each within what the one who asks may see.

use std::fmt;

use model::{
    Actor, ProjectId, Role,
    telemetry::{HostFigures, PoolFigures, Pressure, UplinkFigures, VmFigures},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet, text::encode_registry},
    metrics::MetricType,
    registry::{Registry, Unit},
};

use super::{FRESH, Store};
use crate::committed::{Committed, Place};

/// VMs of a scrape; more are left out, and counted.
const VMS_MAX: usize = 20_000;

type Labels = Vec<(&'static str, String)>;

/// What one scrape tells.
#[derive(Debug, Default)]
struct Snapshot {
    hosts: Vec<(String, HostFigures)>,
    vms: Vec<(Labels, Place, VmFigures)>,
    left_out: usize,
}

impl Store {
    /// In the text format of OpenMetrics, without its end. Hosts and pools for cloud admins; VMs of the actor's project, for cloud admins
    /// of all.
    pub(crate) fn scrape(&self, actor: &Actor, committed: &Committed, text: &mut String) {
        let mut registry = Registry::with_prefix("godwit");
        registry.register_collector(Box::new(self.snapshot(actor, committed)));
        // Writing to a String does not fail.
        let _ = encode_registry(text, &registry);
    }

    fn snapshot(&self, actor: &Actor, committed: &Committed) -> Snapshot {
        let mut snapshot = Snapshot::default();
        let all = actor.role == Role::CloudAdmin;
        let seen = |project: ProjectId| all || project == actor.project;
        for (host, look) in self.looks().iter().filter(|(_, look)| look.came.elapsed() < FRESH) {
            let Some(name) = committed.host_name(*host) else {
                continue;
            };
            for figures in &look.telemetry.vms {
                let place = committed.place_of(figures.vm);
                let Some(place) = place.filter(|place| place.host == Some(*host) && seen(place.project)) else {
                    continue;
                };
                if snapshot.vms.len() >= VMS_MAX {
                    snapshot.left_out += 1;
                    continue;
                }
                let project = committed.project_name(place.project);
                let labels = vec![
                    ("vm", place.name.to_string()),
                    ("vm_id", figures.vm.to_string()),
                    ("host", name.to_string()),
                    ("project", project.map(|name| name.to_string()).unwrap_or_default()),
                ];
                snapshot.vms.push((labels, place, figures.clone()));
            }
            if all {
                snapshot.hosts.push((name.to_string(), look.telemetry.host.clone()));
            }
        }
        snapshot
    }
}

const SECONDS: Option<&Unit> = Some(&Unit::Seconds);
const BYTES: Option<&Unit> = Some(&Unit::Bytes);

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.hosts(&mut encoder)?;
        self.pools(&mut encoder)?;
        self.uplinks(&mut encoder)?;
        self.vms(&mut encoder)?;
        let left_out = "VMs that are left out of this scrape because there are too many";
        let omitted = [(vec![], Some(self.left_out as f64))];
        family(
            &mut encoder,
            "telemetry_vms_omitted",
            left_out,
            None,
            MetricType::Gauge,
            omitted.into_iter(),
        )
    }
}

/// A metric and its samples; those that are not known are left out, the metric is told of in any case.
fn family(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    kind: MetricType,
    samples: impl Iterator<Item = (Labels, Option<f64>)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, unit, kind)?;
    for (labels, value) in samples {
        let Some(value) = value else { continue };
        let labels = LabelsOf(&labels);
        let mut sample = metric.encode_family(&labels)?;
        match kind {
            MetricType::Counter => sample.encode_counter::<NoLabelSet, f64, f64>(&value, None)?,
            _ => sample.encode_gauge(&value)?,
        }
    }
    Ok(())
}

struct LabelsOf<'l>(&'l [(&'static str, String)]);

impl fmt::Debug for LabelsOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl EncodeLabelSet for LabelsOf<'_> {
    fn encode(&self, encoder: &mut prometheus_client::encoding::LabelSetEncoder<'_>) -> fmt::Result {
        use prometheus_client::encoding::EncodeLabel as _;
        self.0
            .iter()
            .try_for_each(|(name, value)| (*name, value.as_str()).encode(encoder.encode_label()))
    }
}

fn count(value: u64) -> Option<f64> {
    Some(value as f64)
}

fn ms(value: u64) -> Option<f64> {
    Some(value as f64 / 1e3)
}

/// The labels and values of each stall: `resource`, and `kind`, `some` or `full`.
fn stalls(labels: &Labels, pressure: &Pressure) -> Vec<(Labels, Option<f64>)> {
    let resources = [("cpu", pressure.cpu), ("memory", pressure.memory), ("io", pressure.io)];
    let mut told = vec![];
    for (resource, stall) in resources {
        let kinds = [
            ("some", stall.map(|stall| stall.some_us)),
            ("full", stall.and_then(|stall| stall.full_us)),
        ];
        for (kind, us) in kinds {
            let mut labels = labels.clone();
            labels.extend([("resource", resource.to_owned()), ("kind", kind.to_owned())]);
            told.push((labels, us.map(|us| us as f64 / 1e6)));
        }
    }
    told
}

impl Snapshot {
    fn hosts(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        use MetricType::{Counter, Gauge};
        let each = || {
            self.hosts
                .iter()
                .map(|(name, host)| (vec![("host", name.clone())], host))
        };
        let of = |read: fn(&HostFigures) -> Option<f64>| each().map(move |(labels, host)| (labels, read(host)));
        family(
            encoder,
            "host_cpus",
            "CPUs of a host",
            None,
            Gauge,
            of(|host| count(host.cpus.into())),
        )?;
        let modes = each().flat_map(|(labels, host)| {
            let cpu = host.cpu;
            let modes = [
                ("user", cpu.user_ms),
                ("system", cpu.system_ms),
                ("idle", cpu.idle_ms),
                ("iowait", cpu.iowait_ms),
                ("steal", cpu.steal_ms),
            ];
            modes.map(|(mode, time)| {
                let mut labels = labels.clone();
                labels.push(("mode", mode.to_owned()));
                (labels, ms(time))
            })
        });
        family(
            encoder,
            "host_cpu",
            "How a host's CPUs spent their time",
            SECONDS,
            Counter,
            modes,
        )?;
        family(
            encoder,
            "host_memory",
            "Memory of a host",
            BYTES,
            Gauge,
            of(|host| count(host.memory_bytes)),
        )?;
        let available = "Memory of a host that new programs could have without swapping";
        let value = of(|host| count(host.memory_available_bytes));
        family(encoder, "host_memory_available", available, BYTES, Gauge, value)?;
        let pressure =
            "For how long some or all work of a host waited for a resource; absent where its kernel does not tell";
        let stalls = each().flat_map(|(labels, host)| stalls(&labels, &host.pressure));
        family(encoder, "host_pressure", pressure, SECONDS, Counter, stalls)
    }

    // tidy: long because it is a list of metrics.
    fn pools(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        use MetricType::{Counter, Gauge};
        let of = |read: fn(&PoolFigures) -> Option<f64>| {
            let pools = self
                .hosts
                .iter()
                .flat_map(|(host, figures)| figures.pools.iter().map(move |pool| (host, pool)));
            pools.map(move |(host, pool)| {
                let labels = vec![("host", host.clone()), ("pool", pool.name.to_string())];
                (labels, read(pool))
            })
        };
        // A pool that has not answered yet has no room that is known.
        let capacity = of(|pool| count(pool.capacity_bytes).filter(|bytes| *bytes > 0.0));
        family(
            encoder,
            "pool_capacity",
            "Room of a pool, as a host sees it",
            BYTES,
            Gauge,
            capacity,
        )?;
        let free = of(|pool| count(pool.free_bytes).filter(|_| pool.capacity_bytes > 0));
        family(
            encoder,
            "pool_free",
            "Free room of a pool, as a host sees it",
            BYTES,
            Gauge,
            free,
        )?;
        let read = "Read from the device below a pool";
        family(
            encoder,
            "pool_read",
            read,
            BYTES,
            Counter,
            of(|pool| count(pool.device?.disk.read_bytes)),
        )?;
        let written = "Written to the device below a pool";
        family(
            encoder,
            "pool_written",
            written,
            BYTES,
            Counter,
            of(|pool| count(pool.device?.disk.written_bytes)),
        )?;
        let reads = "Reads of the device below a pool";
        family(
            encoder,
            "pool_reads",
            reads,
            None,
            Counter,
            of(|pool| count(pool.device?.disk.reads)),
        )?;
        let writes = "Writes of the device below a pool";
        family(
            encoder,
            "pool_writes",
            writes,
            None,
            Counter,
            of(|pool| count(pool.device?.disk.writes)),
        )?;
        let busy = "Time in which the device below a pool was busy";
        family(
            encoder,
            "pool_busy",
            busy,
            SECONDS,
            Counter,
            of(|pool| ms(pool.device?.busy_ms)),
        )
    }

    fn uplinks(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        use MetricType::Counter;
        let of = |read: fn(&UplinkFigures) -> u64| {
            let uplinks = self.hosts.iter();
            let uplinks = uplinks.flat_map(|(host, figures)| figures.uplinks.iter().map(move |uplink| (host, uplink)));
            uplinks.map(move |(host, uplink)| {
                let labels = vec![("host", host.clone()), ("uplink", uplink.name.clone())];
                (labels, count(read(uplink)))
            })
        };
        let received = "Received by a host from other machines";
        family(
            encoder,
            "uplink_received",
            received,
            BYTES,
            Counter,
            of(|uplink| uplink.network.received_bytes),
        )?;
        let sent = "Sent by a host to other machines";
        family(
            encoder,
            "uplink_sent",
            sent,
            BYTES,
            Counter,
            of(|uplink| uplink.network.sent_bytes),
        )?;
        let dropped = "Frames that a host's link dropped instead of taking them in";
        let value = of(|uplink| uplink.network.received_dropped);
        family(encoder, "uplink_received_dropped_frames", dropped, None, Counter, value)?;
        let dropped = "Frames that a host's link dropped instead of sending them";
        family(
            encoder,
            "uplink_sent_dropped_frames",
            dropped,
            None,
            Counter,
            of(|uplink| uplink.network.sent_dropped),
        )
    }

    // tidy: long because it is a list of metrics.
    fn vms(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        use MetricType::{Counter, Gauge};
        let of = |read: fn(&VmFigures) -> Option<f64>| {
            self.vms.iter().map(move |(labels, _, vm)| (labels.clone(), read(vm)))
        };
        let vcpus = self
            .vms
            .iter()
            .map(|(labels, place, _)| (labels.clone(), count(place.vcpus.into())));
        family(encoder, "vm_vcpus", "vCPUs of a VM", None, Gauge, vcpus)?;
        let cpu = "CPU time of a VM's process, of the guest and of what serves it";
        family(encoder, "vm_cpu", cpu, SECONDS, Counter, of(|vm| ms(vm.cpu_ms)))?;
        let wait = "For how long a VM's threads were ready and had no CPU";
        family(
            encoder,
            "vm_cpu_wait",
            wait,
            SECONDS,
            Counter,
            of(|vm| vm.cpu_wait_ms.and_then(ms)),
        )?;
        let memory = "Memory that a VM has on its host";
        family(
            encoder,
            "vm_memory",
            memory,
            BYTES,
            Gauge,
            of(|vm| count(vm.memory_bytes)),
        )?;
        family(
            encoder,
            "vm_disk_read",
            "Read by a guest",
            BYTES,
            Counter,
            of(|vm| count(vm.disk?.read_bytes)),
        )?;
        let written = "Written by a guest";
        family(
            encoder,
            "vm_disk_written",
            written,
            BYTES,
            Counter,
            of(|vm| count(vm.disk?.written_bytes)),
        )?;
        family(
            encoder,
            "vm_disk_reads",
            "Reads of a guest",
            None,
            Counter,
            of(|vm| count(vm.disk?.reads)),
        )?;
        family(
            encoder,
            "vm_disk_writes",
            "Writes of a guest",
            None,
            Counter,
            of(|vm| count(vm.disk?.writes)),
        )?;
        let received = "Received by a guest";
        family(
            encoder,
            "vm_network_received",
            received,
            BYTES,
            Counter,
            of(|vm| count(vm.network.received_bytes)),
        )?;
        let sent = "Sent by a guest";
        family(
            encoder,
            "vm_network_sent",
            sent,
            BYTES,
            Counter,
            of(|vm| count(vm.network.sent_bytes)),
        )?;
        let dropped = "Frames to a guest that were dropped because it did not take them in time";
        let value = of(|vm| count(vm.network.received_dropped));
        family(
            encoder,
            "vm_network_received_dropped_frames",
            dropped,
            None,
            Counter,
            value,
        )?;
        let pressure = "For how long some or all work of a VM waited for a resource; absent where it has no control group of its own";
        let stalls = self.vms.iter().flat_map(|(labels, _, vm)| stalls(labels, &vm.pressure));
        family(encoder, "vm_pressure", pressure, SECONDS, Counter, stalls)
    }
}
