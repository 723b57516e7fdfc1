//! query-cpu-model-expansion: what `-cpu host` means on this host. vcpu-proc knows; it makes the guest's CPUID.

use super::Vm;
use super::query::cpu_type;
use crate::cli::CPUS;
use ipc::cpu::{CpuModelExpansionInfo, CpuModelInfo, CpuProperties, ExpansionType, Property};
use ipc::qmp::QmpError;
use ipc::vcpu::{CpuFeature, VcpuReply, VcpuRequest};

/// The one model that a static expansion starts from, in QEMU's word: it has nothing of its own, so that its properties
/// say everything.
const STATIC_MODEL: &str = "base";
/// Properties that are answered, and cannot be chosen.
const FIXED: &[&str] = &["vendor", "family", "model", "stepping", "level", "xlevel", "model-id"];

/// Expands a model.
///
/// # Errors
/// QEMU's texts for models and properties that do not exist.
pub async fn expand(vm: &Vm, kind: ExpansionType, model: CpuModelInfo) -> Result<CpuModelExpansionInfo, QmpError> {
    let CpuModelInfo { name, props } = model;
    let is_known = CPUS.iter().any(|(known, _)| *known == name) || name == STATIC_MODEL;
    if !is_known {
        return Err(QmpError::generic(format!("CPU model '{name}' not found")));
    }
    let mut changes = Vec::new();
    for (property, value) in props.unwrap_or_default() {
        match value {
            // What a static expansion has returned may be given back.
            _ if FIXED.contains(&property.as_str()) => {}
            Property::Bool(on) => changes.push(CpuFeature { name: property, on }),
            _ => {
                let desc = format!("Invalid parameter type for '{property}', expected: boolean");
                return Err(QmpError::generic(desc));
            }
        }
    }
    let generic = |error: &dyn std::fmt::Display| QmpError::generic(error.to_string());
    let vcpu = vm.vcpu().map_err(|error| generic(&error))?;
    let answer = vcpu.ask(VcpuRequest::ExpandCpuModel { changes }).await;
    match answer.map_err(|error| generic(&error))? {
        VcpuReply::CpuModel(properties) => {
            let name = match kind {
                ExpansionType::Static => STATIC_MODEL.to_owned(),
                ExpansionType::Full => name,
            };
            let props = Some(values(properties).collect());
            let model = CpuModelInfo { name, props };
            Ok(CpuModelExpansionInfo { model })
        }
        VcpuReply::UnknownCpuFeature(feature) => Err(QmpError::generic(format!(
            "Property '{}.{feature}' not found",
            cpu_type(&name)
        ))),
        _ => Err(QmpError::generic(
            "vcpu-proc answered the CPU model request with something else",
        )),
    }
}

fn values(properties: CpuProperties) -> impl Iterator<Item = (String, Property)> {
    let CpuProperties {
        features,
        vendor,
        family,
        model,
        stepping,
        level,
        xlevel,
        model_id,
    } = properties;
    let fixed = [
        ("vendor", Property::Text(vendor)),
        ("family", Property::Int(family.into())),
        ("model", Property::Int(model.into())),
        ("stepping", Property::Int(stepping.into())),
        ("level", Property::Int(level.into())),
        ("xlevel", Property::Int(xlevel.into())),
        ("model-id", Property::Text(model_id)),
    ];
    features
        .into_iter()
        .map(|(name, on)| (name, Property::Bool(on)))
        .chain(fixed.map(|(name, value)| (name.to_owned(), value)))
}
