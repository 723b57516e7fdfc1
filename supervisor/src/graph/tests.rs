use super::node::no_report;
use super::options::NodeOptions;
use super::permissions::Permissions;
use super::settings::Settings;
use super::*;
use ipc::blockdev::FlatOptions;
use ipc::virtio::IoThreadIndex;

/// Adds a node with children of these names.
fn add(graph: &mut Graph, name: &str, json: &str, children: &[(ChildRole, &str)]) -> NodeId {
    let options: FlatOptions = serde_json::from_str(json).unwrap();
    let options = NodeOptions::parse(options).unwrap();
    let id = graph.new_id().unwrap();
    let children = children
        .iter()
        .map(|(role, child)| (*role, graph.node_named(child).unwrap().id))
        .collect();
    graph.insert(Node {
        id,
        name: name.to_owned(),
        settings: Settings::of_root(&options.common),
        options,
        children,
        file: None,
        thread: IoThreadIndex::MAIN,
        is_monitor_owned: true,
        report: no_report(),
        password: None,
    });
    id
}

/// f ← base (qcow2), g ← top (qcow2) over base, t (throttle) over top.
fn chain() -> Graph {
    let mut graph = Graph::default();
    add(&mut graph, "f", r#"{"driver":"null-co"}"#, &[]);
    add(
        &mut graph,
        "base",
        r#"{"driver":"qcow2","file":"f","backing":null,"read-only":true}"#,
        &[(ChildRole::File, "f")],
    );
    add(&mut graph, "g", r#"{"driver":"null-co"}"#, &[]);
    add(
        &mut graph,
        "top",
        r#"{"driver":"qcow2","file":"g","backing":"base"}"#,
        &[(ChildRole::File, "g"), (ChildRole::Backing, "base")],
    );
    add(
        &mut graph,
        "t",
        r#"{"driver":"throttle","file":"top","throttle-group":"x"}"#,
        &[(ChildRole::File, "top")],
    );
    graph
}

fn device_on(graph: &mut Graph, node: &str, number: u8, read_only: bool) {
    let root = graph.node_named(node).unwrap().id;
    graph.backends.push(Backend {
        id: format!("d{number}"),
        device: Some(DeviceIndex(number)),
        read_only,
        ..Backend::of_node(root)
    });
}

fn names(graph: &Graph, ids: impl IntoIterator<Item = NodeId>) -> Vec<&str> {
    ids.into_iter().map(|id| graph.nodes[&id].name.as_str()).collect()
}

#[test]
fn trees_and_chains_are_walked() {
    let mut graph = chain();
    let t = graph.node_named("t").unwrap().id;
    assert_eq!(names(&graph, graph.tree(t)), ["g", "f", "base", "top", "t"]);
    let chain: Vec<_> = graph.chain(t).iter().map(|node| node.name.clone()).collect();
    assert_eq!(chain, ["t", "top", "base"]);
    device_on(&mut graph, "t", 3, false);
    let f = graph.node_named("f").unwrap().id;
    assert_eq!(graph.devices_above(f), [DeviceIndex(3)]);
}

#[test]
fn lookups_prefer_the_device_and_have_the_protocols_texts() {
    let mut graph = chain();
    device_on(&mut graph, "t", 0, false);
    assert_eq!(graph.lookup(Some("d0"), Some("nope")).unwrap().name, "t");
    assert_eq!(graph.lookup_any("base").unwrap().name, "base");
    for (device, node, text) in [
        (Some("nope"), None, "Cannot find device='nope' nor node-name=''"),
        (None, Some("nope"), "Cannot find device='' nor node-name='nope'"),
        (None, None, "Cannot find device='' nor node-name=''"),
    ] {
        assert_eq!(graph.lookup(device, node).unwrap_err().to_string(), text);
    }
    graph.backends[0].root = None;
    assert_eq!(
        graph.lookup_any("d0").unwrap_err().to_string(),
        "Device 'd0' has no medium"
    );
    let missing = graph.lookup_drive("x").unwrap_err();
    assert_eq!(missing.to_string(), "Device 'x' not found");
}

#[test]
fn names_keep_the_rules() {
    let mut graph = chain();
    device_on(&mut graph, "t", 0, false);
    for (name, text) in [
        ("1bad", "Invalid node-name: '1bad'"),
        ("bad name!", "Invalid node-name: 'bad name!'"),
        ("", "Invalid node-name: ''"),
        ("top", "Duplicate nodes with node-name='top'"),
        ("d0", "node-name=d0 is conflicting with a device id"),
        ("a23456789012345678901234567890123", "Node name too long"),
    ] {
        assert_eq!(graph.check_name(name).unwrap_err().to_string(), text);
    }
    graph.check_name("new").unwrap();
    assert!(graph.check_drive_id("top").is_err() && graph.check_drive_id("d0").is_err());
    graph.check_drive_id("d1").unwrap();
}

#[test]
fn writers_do_not_share() {
    let mut graph = chain();
    graph.check_permissions().unwrap();
    device_on(&mut graph, "t", 0, false);
    graph.check_permissions().unwrap();
    let needs = graph.needs(graph.node_named("g").unwrap().id);
    assert!(needs.uses.contains(Permissions::WRITE.and(Permissions::RESIZE)));
    let base = graph.needs(graph.node_named("f").unwrap().id);
    assert!(!base.uses.contains(Permissions::WRITE));
    for (node, number) in [("top", 1), ("g", 1)] {
        let mut more = graph.clone();
        device_on(&mut more, node, number, false);
        let text = more.check_permissions().unwrap_err().to_string();
        assert!(text.contains("Permission conflict on node"), "{text}");
    }
    let mut more = graph.clone();
    device_on(&mut more, "base", 1, false);
    assert_eq!(
        more.check_permissions().unwrap_err().to_string(),
        "Block node is read-only"
    );
    // Who reads what nobody writes is welcome.
    device_on(&mut graph, "base", 2, true);
    graph.check_permissions().unwrap();
}

#[test]
fn cycles_and_other_threads_are_refused() {
    let mut graph = chain();
    let (base, top, t) = (
        graph.node_named("base").unwrap().id,
        graph.node_named("top").unwrap().id,
        graph.node_named("t").unwrap().id,
    );
    for (parent, child) in [(base, top), (base, t), (top, top)] {
        let refused = graph.set_child(parent, ChildRole::Backing, Some(child));
        assert!(matches!(refused, Err(GraphError::Cycle { .. })), "{refused:?}");
    }
    graph.set_child(top, ChildRole::Backing, None).unwrap();
    assert_eq!(graph.chain(t).len(), 2);
    graph.nodes.get_mut(&base).unwrap().thread = IoThreadIndex(1);
    let refused = graph.set_child(top, ChildRole::Backing, Some(base));
    assert!(matches!(refused, Err(GraphError::OtherThread(_))));
}

#[test]
fn what_nothing_keeps_goes_from_the_top() {
    let mut graph = chain();
    assert!(graph.unused().is_empty());
    for name in ["t", "top", "g", "f"] {
        let id = graph.node_named(name).unwrap().id;
        graph.nodes.get_mut(&id).unwrap().is_monitor_owned = false;
    }
    let unused = graph.unused();
    let unused = names(&graph, unused);
    assert_eq!(unused, ["t", "top", "g"]);
    device_on(&mut graph, "t", 0, false);
    assert!(graph.unused().is_empty());
}
