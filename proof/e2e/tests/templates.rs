//! A VM goes to a host whose pool lacks its template: the host fetches that once, from a host that has it or from the controller.

use anyhow::{Context, Result, ensure};
use e2e::fixture::{Guest, MEMORY, Shared};
use e2e::lab::Place;
use e2e::suite;
use serde_json::Value;
use std::process::ExitCode;
use std::time::Duration;

/// How long a host may take to be seen as lost, or as there again.
const SEEN_LIMIT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    suite::main::<Shared>(e2e::cases![
        five_vms_on_a_host_without_the_template_fetch_it_once_from_another_host,
        a_host_fetches_it_from_the_controller_when_no_other_host_is_there,
    ])
}

/// The pool that host `n` alone sees: its name and id.
fn own_pool(shared: &Shared, n: u8) -> Result<(String, String)> {
    let id = shared
        .cluster
        .lab()
        .run(Place::Host(n), &["cat", "/srv/godwit/local/.godwit-pool"])?;
    let pools = shared.cluster.json(&["pool", "list"])?;
    let pool = pools
        .as_array()
        .into_iter()
        .flatten()
        .find(|pool| pool["id"] == id.trim());
    let name = pool
        .and_then(|pool| pool["name"].as_str())
        .context("the host's own pool is not listed")?;
    Ok((name.to_owned(), id.trim().to_owned()))
}

/// The digests of the template's blobs.
fn blobs(template: &Value) -> Vec<String> {
    let content = &template["content"];
    let blobs = [
        &content["boot"]["kernel"],
        &content["boot"]["initrd"],
        &content["disk"]["blob"],
    ];
    let digests = blobs.iter().filter_map(|blob| blob["digest"].as_str());
    digests.map(str::to_owned).collect()
}

/// Who brought each of the template's blobs to host `n`, by its agent's log.
fn fetched(shared: &Shared, n: u8, pool: &str) -> Result<Vec<(String, String)>> {
    let log = std::fs::read_to_string(shared.cluster.lab().logs().join(format!("agent-h{n}.log")))?;
    let lines = log
        .lines()
        .filter(|line| line.contains("a blob was fetched") && line.contains(&format!("pool={pool} ")));
    let field = |line: &str, name: &str| {
        let rest = line.split_once(&format!("{name}="))?.1;
        let value = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split('"').next(),
            None => rest.split(' ').next(),
        };
        value.map(str::to_owned)
    };
    let read = lines.map(|line| {
        field(line, "digest")
            .zip(field(line, "from"))
            .context("a line without who and what")
    });
    read.collect()
}

/// Makes VMs on host `n`'s own pool, all at once; returns them when they answer.
fn make(shared: &Shared, n: u8, pool: &str, count: u8) -> Result<Vec<Guest>> {
    let (host, names) = (
        format!("h{n}"),
        (1..=count).map(|i| format!("fetch{n}{i}")).collect::<Vec<_>>(),
    );
    let begin = |name: &String| {
        let words = [
            "vm",
            "create",
            name,
            "--template",
            "micro",
            "--memory",
            MEMORY,
            "--host",
            &host,
            "--pool",
            pool,
        ];
        shared.cluster.json(&words)
    };
    let begun: Vec<Value> = names.iter().map(begin).collect::<Result<_>>()?;
    for operation in &begun {
        let ended = shared.ended(operation["id"].as_str().context("no operation")?, 120)?;
        ensure!(
            ended["state"]["state"] == "succeeded",
            "the operation ended so: {ended}"
        );
    }
    names.iter().map(|name| shared.guest(name)).collect()
}

fn five_vms_on_a_host_without_the_template_fetch_it_once_from_another_host(shared: &mut Shared) -> Result<()> {
    let (pool, id) = own_pool(shared, 2)?;
    let template = shared.cluster.json(&["template", "show", "micro"])?;
    ensure!(
        !template["state"]["pools"].to_string().contains(&id),
        "it is there already"
    );
    let guests = make(shared, 2, &pool, 5)?;
    for guest in &guests {
        guest.write_disk(4, 7)?;
        guest.check_disk()?;
    }
    let fetched = fetched(shared, 2, "local")?;
    for digest in blobs(&template) {
        let times = fetched.iter().filter(|(of, _)| *of == digest).count();
        ensure!(times == 1, "blob {digest} was fetched {times} times");
    }
    ensure!(
        fetched.iter().all(|(_, from)| from != "the controller"),
        "not from hosts: {fetched:?}"
    );
    let template = shared.cluster.json(&["template", "show", "micro"])?;
    ensure!(
        template["state"]["pools"].to_string().contains(&id),
        "its pool is not told: {}",
        template["state"]
    );
    let shown = shared.cluster.cli(&["template", "show", "micro"])?;
    ensure!(shown.contains(&pool), "people are not told: {shown}");
    Ok(())
}

fn a_host_fetches_it_from_the_controller_when_no_other_host_is_there(shared: &mut Shared) -> Result<()> {
    let (pool, _) = own_pool(shared, 3)?;
    for n in [1, 2] {
        shared.cluster.kill_agent(n)?;
    }
    let end = std::time::Instant::now() + SEEN_LIMIT;
    while shared
        .cluster
        .json(&["host", "list"])?
        .to_string()
        .matches("\"lost\"")
        .count()
        < 2
    {
        ensure!(std::time::Instant::now() < end, "the hosts are not seen as lost");
        std::thread::sleep(Duration::from_millis(200)); // tidy: sleep because the command line offers no event for an arbitrary condition
    }
    let made = make(shared, 3, &pool, 1);
    for n in [1, 2] {
        shared.cluster.start_agent(n)?;
    }
    made?;
    let fetched = fetched(shared, 3, "local")?;
    ensure!(!fetched.is_empty(), "nothing was fetched");
    ensure!(
        fetched.iter().all(|(_, from)| from == "the controller"),
        "from elsewhere: {fetched:?}"
    );
    Ok(())
}
