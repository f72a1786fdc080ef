# ruff: noqa: E401, I001
import json, subprocess, sys, sklearn.datasets, sklearn.neural_network, torch, ddlr

inputs, labels = sklearn.datasets.load_digits(return_X_y=True)
trained = sklearn.neural_network.MLPClassifier(48, max_iter=500).fit(inputs, labels)
model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 10))
for layer, weight, bias in zip(model[::2], trained.coefs_, trained.intercepts_, strict=True):
    layer.load_state_dict({"weight": torch.tensor(weight.T), "bias": torch.tensor(bias)})
result = ddlr.compress(model, torch.tensor(inputs).float(), kept_fraction=0.5)
ddlr.save(result, "small.safetensors")
ddlr.to_onnx(result, torch.eye(64), "small.onnx")  # which compares outputs
code = "import torch, ddlr; print(ddlr.load('small.safetensors')(torch.eye(64)).tolist())"
output = json.loads(subprocess.check_output([sys.executable, "-c", code]))
assert torch.allclose(torch.tensor(output), result.model(torch.eye(64)), atol=1e-4)
